"""Rows in processes of their own: what they find, and what is said of those that find nothing."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adoption import sample, stub_rows
from anyflash.adoption import claims, registry, run
from anyflash.adoption.measure import QUICK
from anyflash.adoption.row import Row
from anyflash.cli import main

Run = Callable[[str], dict[str, Any]]


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> Run:
    tests = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))

    def one(name: str) -> dict[str, Any]:
        rows = [r for r in registry.defined_in("adoption.stub_rows") if r.name == name]
        parts: list[float] = []
        (found,) = run.run(rows, True, lambda row, doing, part: parts.append(part))
        assert parts == sorted(parts)
        assert parts[-1] == 1.0
        return found

    return one


def test_a_row_that_goes_right(outcome: Run) -> None:
    found = outcome("right")
    assert found["status"] == "ok"
    assert found["versions"]["numpy"]
    by_role = {v["role"]: v for v in found["variants"]}
    for role, variant in by_role.items():
        assert len(variant["seconds"]) == QUICK.rounds
        assert variant["median"] == statistics.median(variant["seconds"]) >= stub_rows.SECONDS[role]
        assert variant["peak_bytes"] == pytest.approx(stub_rows.MIB[role] << 20, rel=0.1)
    for role in ("eager", "best"):
        assert found["speedup"][role] == by_role[role]["median"] / by_role["ours"]["median"]
    assert [a["kind"] for a in found["agreement"]] == ["outputs", "gradients"]
    assert found["agreement"][0]["difference"] == 0.0
    json.dumps(found)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong", "our outputs err by 1.0e-03"),
        ("fails", "OSError: the model file is gone"),
        ("dies", "ended with code"),
        ("parts", "our loss leaves eager's by 2.50e-01 in 8 steps, and training gained 1.75"),
        ("stays", "learned nothing in 8 steps"),
        ("diverges", "not finite: eager 2.25, best 2.25, ours nan"),
    ],
)
def test_a_row_that_fails(name: str, why: str, outcome: Run) -> None:
    found = outcome(name)
    assert found["status"] == "failed"
    assert why in found["why"]
    if name == "dies":
        assert any("last words" in line for line in found["log"])


def test_a_row_that_trains(outcome: Run) -> None:
    found = outcome("learns")
    assert found["status"] == "ok"
    assert found["curve"]["losses"]["ours"] == stub_rows.NEAR
    assert found["curve"]["difference"] == pytest.approx(0.01)
    assert found["curve"]["gained"] == 1.75


def test_a_row_that_grows(outcome: Run) -> None:
    """Sizes are tried until one passes 100 MiB: 64, 32 and 16 MiB a unit, four at most."""
    found = outcome("reaches")
    assert found["status"] == "ok"
    assert found["reach"]["longest"] == {"eager": 1, "best": 3, "ours": 4}
    assert found["reach"]["open"] == ["ours"]
    assert list(found["reach"]["peaks"]["eager"]) == ["1", "2"]


def test_rows_are_kept_one_by_one(outcome: Run) -> None:
    assert outcome("absent")["status"] == "absent"
    seen: list[int] = []
    rows = [r for r in registry.defined_in("adoption.stub_rows") if r.name in ("absent", "fails")]
    run.run(rows, True, lambda row, doing, part: None, lambda found: seen.append(len(found)))
    assert seen == [1, 2]


def test_an_absent_system(outcome: Run) -> None:
    found = outcome("absent")
    assert found["status"] == "absent"
    assert found["how_to_install"] == ["pip install no-such-distribution"]


def test_rows_are_found_by_listing() -> None:
    rows = registry.rows()
    assert len({r.name for r in rows}) == len(rows)
    assert {r.system for r in rows} >= {"PyTorch", "Hugging Face transformers"}
    assert [r.name for r in registry.rows("minilm")] == [r.name for r in rows if "minilm" in r.name]
    with pytest.raises(KeyError, match=r"there are: .*torch-encoder"):
        registry.rows("no such row")


@pytest.mark.parametrize("failing", [False, True])
def test_command(failing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(rows: list[Row], quick: bool, progress: Any, keep: Any) -> list[dict[str, Any]]:
        assert quick
        progress(rows[0], "timing", 0.5)
        found = [r for r in sample.rows() if failing or r["status"] != "failed"]
        keep(found[:1])
        kept = json.loads((tmp_path / "new" / "adoption.json").read_text())
        assert [r["name"] for r in kept["rows"]] == [found[0]["name"]]
        return found

    monkeypatch.setattr(run, "run", measured)
    result = CliRunner().invoke(main.app(), ["adoption", "--quick", "--out", str(tmp_path / "new")])
    assert result.exit_code == int(failing), result.output
    assert (tmp_path / "new" / "adoption.html").stat().st_size > 1000
    rows = json.loads((tmp_path / "new" / "adoption.json").read_text())["rows"]
    assert len(rows) == 4 + failing
    for text in ("1.59×", "398 ms", "71 MiB", "1.5e-06", "pip install 'it>=1,<2'"):
        assert text in result.output
    assert ("our <outputs> err" in result.output) == failing


def test_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows that were measured stay; those that failed or were not there are run."""
    asked: list[str] = []

    def measured(rows: list[Row], quick: bool, progress: Any, keep: Any) -> list[dict[str, Any]]:
        asked[:] = [r.name for r in rows]
        return [r | {"workload": f"run of {len(asked)}"} for r in sample.rows() if r["name"] in asked]

    names = [r["name"] for r in sample.rows()]
    everything = [Row(n, "Stub", n, (), stub_rows.fails) for n in names]
    monkeypatch.setattr(run, "run", measured)
    monkeypatch.setattr(registry, "rows", lambda only=None: [r for r in everything if only in (None, r.name)])
    command = ["adoption", "--quick", "--out", str(tmp_path)]
    found = []
    for options in ([], ["--resume"], ["--resume", "--only", "packed"]):
        CliRunner().invoke(main.app(), [*command, *options], catch_exceptions=False)
        found.append((list(asked), json.loads((tmp_path / "adoption.json").read_text())))
    assert [f[0] for f in found] == [names, ["absent", "failed"], ["packed"]]
    assert [r["name"] for r in found[2][1]["rows"]] == names
    works = {r["name"]: r.get("workload") for r in found[2][1]["rows"]}
    assert (works["packed"], works["torch-encoder-float32"]) == ("run of 1", "run of 5")
    assert len(found[2][1]["taken_up"]) == 2
    result = CliRunner().invoke(main.app(), ["adoption", "--out", str(tmp_path), "--resume"])
    assert "a run with other quick" in str(result.exception)


def test_every_system_has_its_claim() -> None:
    systems = {r.system for r in registry.rows()}
    assert systems <= claims.CLAIMS.keys()
    assert claims.CLAIMS.keys() <= systems


def test_command_names_the_rows() -> None:
    result = CliRunner().invoke(main.app(), ["adoption", "--only", "no such row"])
    assert result.exit_code == 2
    assert "torch-encoder" in result.output
