"""A tiny grid from end to end, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import anyflash as af
from anyflash.bench import grid, run, timing
from anyflash.cli import main
from anyflash.core.errors import InvalidCall
from bench import tiny

CELLS = (
    tiny.cell("causal", backward=True, threads=1),
    tiny.cell("full", heads_kv=1, seqlen_q=1, seqlen_k=200, measure="memory"),
    tiny.cell("full", batch=1, heads=1, seqlen_q=16, frontend="numpy", measure="call"),
    tiny.cell("causal", heads_kv=2, seqlen_q=1, seqlen_k=200, cache=16, measure="memory"),
)


@pytest.fixture(autouse=True)
def tiny_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        grid.GRIDS,
        "core",
        grid.Grid("tiny", lambda: iter(CELLS), ("torch flash", "torch math", "transformers")),
    )
    monkeypatch.setattr(run, "FULL", tiny.EFFORT)
    monkeypatch.setattr(run, "QUICK", tiny.EFFORT)


def bench(*options: str) -> Result:
    return CliRunner().invoke(main.app(), ["bench", *options])


def test_end_to_end(tmp_path: Path) -> None:
    done = bench("--out", str(tmp_path / "out"), "--report", str(tmp_path / "docs" / "cpu.md"))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [r["status"] for r in found["cells"]] == ["ok"] * 4
    compute, memory, call, cached = found["cells"]
    for record in found["cells"]:
        assert record["ours"]["seconds"] > 0
        beside = ("transformers sdpa",) if record is cached else ("torch flash", "torch math")
        assert record["ratio"]["peer"] in beside
        low, high = record["ratio"]["interval"]
        assert low <= record["ratio"]["median"] <= high
        assert {peer["status"] for peer in record["peers"]} <= {"timed", "lacks"}
    assert compute["threads"] == 1
    assert compute["ceiling"]["name"].startswith("GEMM float32")
    assert compute["ours"]["per_second"] == pytest.approx(compute["flops"] / compute["ours"]["seconds"])
    assert memory["ceiling"]["name"] == "memory read"
    assert memory["ours"]["per_second"] == pytest.approx(memory["bytes"] / memory["ours"]["seconds"])
    assert call["ceiling"] is None and call["share"] is None
    for cell in CELLS:
        assert cell.name in done.output
        assert cell.name in (tmp_path / "docs" / "cpu.md").read_text()
    assert (tmp_path / "docs" / "cpu-ratio.png").exists()


def test_shown_again_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench("--out", str(tmp_path), "--only", "numpy").exit_code == 0
    monkeypatch.setattr(timing, "interleave", lambda *_: pytest.fail("measured again"))
    done = bench("--from", str(tmp_path / "bench.json"), "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert CELLS[2].name in done.output and CELLS[0].name not in done.output


def test_taken_up_again(tmp_path: Path) -> None:
    """Cells that were measured are kept as they are; a run of another effort is not mixed in."""
    assert bench("--out", str(tmp_path), "--only", "numpy").exit_code == 0
    (kept,) = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert bench("--out", str(tmp_path), "--resume").exit_code == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["cells"][2] == kept and len(found["resumed"]) == 1
    assert [record["name"] for record in found["cells"]] == [cell.name for cell in CELLS]
    assert run.missing(found) == []
    assert run.missing({**found, "cells": found["cells"][1:]}) == [CELLS[0].name]
    refused = bench("--out", str(tmp_path), "--resume", "--quick")
    assert isinstance(refused.exception, InvalidCall) and "other quick" in str(refused.exception)


def test_a_wrong_kernel_ends_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = af.attention
    monkeypatch.setattr(af, "attention", lambda *qkv, **rest: 1.01 * right(*qkv, **rest))
    done = bench("--out", str(tmp_path), "--only", "causal fwd.bwd")
    assert done.exit_code == 1
    assert "disagrees" in done.output
    (record,) = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert record["status"] == "disagrees" and "seconds" not in record["ours"]


def test_list() -> None:
    assert bench("--list", "--only", "numpy").output.split("\n")[:-1] == [CELLS[2].name]


@pytest.mark.parametrize(
    ("wanted", "argument"),
    [
        (run.Wanted("gird"), "grid"),
        (run.Wanted(only="no such cell"), "only"),
        (run.Wanted(only="("), "only"),
        (run.Wanted(peers=("tensorflow",)), "peers"),
    ],
)
def test_wrong_wishes(wanted: run.Wanted, argument: str) -> None:
    with pytest.raises(InvalidCall, match=f"^{argument}: "):
        run.run(wanted, lambda *_: None)


def test_threads_of_our_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLASH_NUM_THREADS", "3")
    with pytest.raises(InvalidCall, match=r"^ANYFLASH_NUM_THREADS: 3"):
        run.run(run.Wanted(threads=2), lambda *_: None)
