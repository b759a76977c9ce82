"""`anyflash doctor` names everything that the registries and settings hold, and what is broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from anyflash.adapters import registry as adapters
from anyflash.backends import registry as backends
from anyflash.cli import _machine, main
from anyflash.core.settings import SETTINGS
from anyflash.kernels.llvm import target


@pytest.fixture(autouse=True)
def fresh_targets() -> Iterator[None]:
    """The host's target is looked up once a process and would outlive a test's settings."""
    yield
    target._host_target.cache_clear()


def _doctor(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(main.app(), ["doctor", *options], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def _facts(*options: str) -> tuple[int, dict[str, Any]]:
    code, output = _doctor("--json", *options)
    return code, json.loads(output)


def test_every_backend_adapter_and_setting_is_there() -> None:
    code, found = _facts("--no-check")
    assert code == 0
    assert [row["name"] for row in found["backends"]] == list(backends.entries())
    assert [row["name"] for row in found["adapters"]] == adapters.names()
    assert [row["name"] for row in found["settings"]] == list(SETTINGS)
    assert {"numpy", "llvmlite"} <= {row["name"] for row in found["packages"] if row["version"]}
    assert found["cache"]["directory"]
    code, shown = _doctor("--no-check")
    assert code == 0
    assert all(name in shown for name in (*backends.entries(), *adapters.names(), *SETTINGS))


def test_backends_run() -> None:
    assert all(row["ran"] for row in _machine.backends(check=True))


@pytest.mark.slow
def test_adapters_whose_system_is_here_work() -> None:
    assert [row for row in _machine.adapters(check=True) if row["version"] and row["problem"]] == []


def test_backend_that_cannot_be_loaded_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**backends.entries(), "warp": backends.Entry("warp", None, ImportError("no warp drive"))}
    monkeypatch.setattr(backends, "entries", lambda: broken)
    code, shown = _doctor("--no-check")
    assert code == 1
    assert "no warp drive" in shown


def test_backend_that_gives_wrong_results_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import anyflash as af

    right = af.attention
    wrong = {"cpu": 1.001, "reference": 1.0}
    monkeypatch.setattr(
        af, "attention", lambda *qkv, backend, **rest: right(*qkv, backend=backend, **rest) * wrong[backend]
    )
    rows = {row["name"]: row for row in _machine.backends(check=True)}
    assert rows["cpu"]["broken"]
    assert "differs from the definition" in rows["cpu"]["problem"]
    assert not rows["reference"]["broken"]


@pytest.mark.parametrize(
    ("name", "value"), [("ANYFLASH_NUM_THREADS", "none"), ("ANYFLASH_CPU", "avx1024")], ids=lambda x: x
)
def test_bad_setting_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    code, shown = _doctor("--no-check")
    assert code == 1
    assert value in shown


def test_package_is_named_with_the_smallest_extra_that_has_it() -> None:
    wanted = {row["name"]: row["for"] for row in _machine.packages()}
    assert wanted["numpy"] == "anyflash"
    assert wanted["torch"] == "anyflash[torch]"
    assert wanted["rich"] == "anyflash[cli]"
    assert "pytest" not in wanted
