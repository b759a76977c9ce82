"""`anyflash verify` runs what it is asked to, and fails with a repro."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from anyflash.cli import main, verify
from anyflash.contract.backends import present
from anyflash.contract.run import Report
from anyflash.core.errors import BackendBroken, InvalidCall

BACKEND = present()[0]


def invoke(*options):
    return CliRunner().invoke(main.app(), ["verify", *options], env={"COLUMNS": "200"})


def test_passes_on_a_backend():
    done = invoke("--backend", BACKEND, "--only", "float32-heads_1_1", "--cases", "1")
    assert done.exit_code == 0, done.output
    assert "2 runs" in done.output


def test_repro_runs_one_case_and_shows_it():
    done = invoke("--backend", "reference", "--repro", "table:float32-causal")
    assert done.exit_code == 0, done.output
    assert "1 runs" in done.output
    assert "Causal()" in done.output


def test_failure_prints_the_repro_and_fails(monkeypatch):
    monkeypatch.setattr(verify, "run", lambda case, backend: Report(case, backend, ["out: wrong"]))
    done = invoke("--backend", "reference", "--only", "float32-causal", "--cases", "0")
    assert done.exit_code == 1
    assert "out: wrong" in done.output
    assert "python -m anyflash verify --backend reference --repro 'table:float32-causal'" in done.output


def test_error_of_a_backend_is_a_failure_of_its_case(monkeypatch):
    def broken(case, backend):
        raise BackendBroken(backend, "running forward", "no reason")

    monkeypatch.setattr(verify, "run", broken)
    done = invoke("--backend", "reference", "--only", "float32-causal", "--cases", "0")
    assert done.exit_code == 1
    assert "BackendBroken" in done.output


def test_unknown_backend_names_those_that_work():
    done = invoke("--backend", "abacus")
    assert isinstance(done.exception, InvalidCall)
    assert BACKEND in str(done.exception)


@pytest.mark.parametrize("text", ["table:none", "17"])
def test_bad_repro(text):
    assert isinstance(invoke("--repro", text).exception, InvalidCall)
