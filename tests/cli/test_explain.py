"""`anyflash explain` is `anyflash.explain` on shapes from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import anyflash as af
from anyflash.cli import main


def _explain(*options: str) -> Result:
    return CliRunner().invoke(main.app(), ["explain", *options])


def test_same_as_the_function() -> None:
    q, k = np.zeros((2, 96, 4, 32), np.float16), np.zeros((2, 128, 2, 32), np.float16)
    said = af.explain(q, k, k[..., :16], causal=True, window=(64, 0), softcap=30.0)
    shown = _explain(
        *("--batch", "2", "--q", "96", "--k", "128", "--heads", "4", "--heads-kv", "2", "--dim", "32"),
        *("--dim-v", "16", "--dtype", "float16", "--causal", "--window", "64,0", "--softcap", "30"),
    )
    assert shown.exit_code == 0, shown.output
    assert shown.output.strip() == str(said)


def test_json_names_the_backend() -> None:
    found = json.loads(_explain("--q", "64", "--backend", "reference", "--json").output)
    assert found["backend"] == "reference"
    assert found["problem"]["seqlen_q"] == 64
    assert "cpu" in found["declined"]


def test_long_shapes_need_no_memory() -> None:
    assert _explain("--q", str(2**24), "--heads", "128", "--dtype", "bfloat16", "--causal").exit_code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--dtype", "int8"), "expected one of float16"), (("--heads", "3", "--heads-kv", "2"), "divides")],
    ids=["dtype", "heads"],
)
def test_bad_options_are_explained(options: tuple[str, ...], said: str) -> None:
    done = _explain(*options)
    assert done.exit_code != 0
    assert said in done.output + str(done.exception)
