"""Every backend on every case of the table. Ids read backend-direction-dtype-case, for `-k 'cpu and
forward'`."""

from __future__ import annotations

import pytest

from anyflash.contract.backends import present
from anyflash.contract.run import DIRECTIONS, run
from anyflash.contract.table import table

CASES = [
    pytest.param(backend, case, direction, id=f"{backend}-{direction}-{case.id}")
    for backend in present()
    for case in table()
    for direction in DIRECTIONS
    if direction == "forward" or case.differentiable
]


@pytest.mark.parametrize(("backend", "case", "direction"), CASES)
def test_case(backend, case, direction):
    report = run(case, backend, (direction,))
    if report.declined:
        pytest.skip(f"{backend}: {'; '.join(report.declined)}")
    assert not report.failures, "\n".join(
        [f"python -m anyflash verify --backend {backend} --repro 'table:{case.id}'", *report.failures]
    )


def test_ids_are_unique():
    ids = [case.id for case in table()]
    assert len(set(ids)) == len(ids)
