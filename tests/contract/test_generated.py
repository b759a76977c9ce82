"""Cases drawn from seeds, and the texts that name them."""

from __future__ import annotations

import pytest

from anyflash.contract.backends import present
from anyflash.contract.generate import generate, generated, parse, repro
from anyflash.contract.run import run
from anyflash.contract.table import table
from anyflash.core.errors import InvalidCall

COUNTS = {"reference": 25}
SEED = 1
CASES = [
    pytest.param(backend, case, id=f"{backend}-{case.id}")
    for backend in present()
    for case in generated(COUNTS.get(backend, 80), SEED)
]


@pytest.mark.parametrize(("backend", "case"), CASES)
def test_case(backend, case):
    report = run(case, backend)
    command = f"python -m anyflash verify --backend {backend} --repro '{repro(case)}'"
    assert not report.failures, "\n".join([command, str(case), *report.failures])


def test_same_seeds_same_case():
    assert generate(7, 8) == generate(7, 8)
    assert generate(7, 8) != generate(8, 8)


@pytest.mark.parametrize("case", [*generated(10, 3), *table()[::40]], ids=lambda case: case.id)
def test_repro_names_the_case(case):
    assert parse(repro(case)) == case


def test_repro_with_changes():
    case = parse("seed:3:4:dtype=float64:lens=(3,5)")
    assert (case.dtype, case.lens) == ("float64", (3, 5))
    assert parse(repro(case)) == case
    assert parse("table:float32-causal:batch=1").batch == 1


@pytest.mark.parametrize("text", ["", "seed:1", "seed:a:b", "table:no_such", "seed:1:2:rules=()", "disk:1"])
def test_bad_repro_says_what_is_expected(text):
    with pytest.raises(InvalidCall, match="table:CASE or seed:GEOMETRY:DATA"):
        parse(text)
