"""Figures and text made from the records of a run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from anyflash.bench import goals, grid, run, summary
from anyflash.bench.cells import Cell
from anyflash.bench.report import markdown
from anyflash.cli import _bench_charts
from anyflash.core.errors import InvalidCall

Record = dict[str, Any]


def record(cell: Cell, ratio: float | None = 2.0, seconds: float = 0.01, share: float | None = 0.5) -> Record:
    peers: list[Record] = [
        {"name": "torch flash", "family": "torch flash", "status": "lacks", "why": "no dropout"},
        {"name": "onnxruntime A", "family": "onnxruntime", "status": "disagrees", "why": "out: off"},
        {"name": "onnxruntime B", "family": "onnxruntime", "status": "lacks", "why": "no backward"},
        {"name": "openvino", "family": "openvino", "status": "missing", "why": "openvino is not installed"},
    ]
    if ratio is not None:
        peers[0] = peers[0] | {"status": "timed", "why": None, "ratio": ratio, "seconds": seconds * ratio}
    return {
        "name": cell.name,
        "cell": run.asdict(cell),
        "status": "ok",
        "why": None,
        "threads": 2,
        "flops": 10**9,
        "bytes": 10**6,
        "ours": {"seconds": seconds, "samples": [seconds], "per_second": 1e9 / seconds, "error": 1e-7},
        "peers": peers,
        "ratio": None
        if ratio is None
        else {"peer": "torch flash", "median": ratio, "interval": [ratio, ratio]},
        "ceiling": None,
        "share": share,
    }


def report(*records: Record, **changes: Any) -> run.Report:
    machine = {
        "processor": "A|B", "architecture": "x86_64", "instruction_set": "avx2", "cores": 2,
        "torch_instruction_set": "AVX2", "last_level_cache_bytes": 1 << 25, "memory_bytes": 1 << 34,
        "system": "Linux", "load_before": 0.1,
        "versions": {"python": "3.11", "openvino": None}, "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    effort = {"least": 3, "most": 9, "seconds": 1.0, "spread": 0.05, "turn": 0.01}
    return {
        "format": run.FORMAT, "grid": "core", "only": None, "quick": False, "threads": 2, "effort": effort,
        "machine": machine, "startup": None, "cells": list(records),
    } | changes  # fmt: skip


FORWARD = Cell("float32", 1, 4, 4096, 128)
CAUSAL = Cell("float32", 1, 4, 4096, 128, variant="causal")
BACKWARD = Cell("float32", 1, 4, 4096, 128, backward=True)


def found(text: str, made: run.Report) -> float | None:
    (goal,) = [goal for goal in goals.GOALS if goal.text.startswith(text)]
    answer = goal.compute(made)
    return None if answer is None else answer.value


def small(frontend: Any) -> Cell:
    return Cell("small", 1, 1, 16, 64, frontend=frontend, measure="call")


@pytest.mark.parametrize(
    ("text", "records", "value"),
    [
        ("every cell", [record(FORWARD, 2.0), record(CAUSAL, 0.5)], 0.5),
        ("float32 forward: mean", [record(FORWARD, 4.0), record(Cell("float32", 1, 8, 512, 64), 1.0)], 2.0),
        ("float32 forward and backward: mean", [record(BACKWARD, 3.0), record(FORWARD, 1.0)], 3.0),
        ("float32 causal: mean", [record(CAUSAL, 3.0), record(FORWARD, 1.0)], 3.0),
        ("float32 causal: mean", [record(CAUSAL, None)], None),
        (
            "float32 forward at 4096, head_dim 128",
            [record(FORWARD, share=0.8), record(CAUSAL, share=0.1)],
            0.8,
        ),
        ("float32 forward at 4096: time", [record(FORWARD, seconds=1.0), record(CAUSAL, seconds=0.6)], 0.6),
        ("float32 forward at 4096: time", [record(FORWARD)], None),
        (
            "two threads",
            [record(Cell("threads", 1, 8, 64, 64, threads=n), seconds=2.0 / n**0.5) for n in (1, 2)],
            2**0.5,
        ),
        (
            "window, forward",
            [
                record(Cell("variants", 1, 4, n, 64, variant="window"), seconds=t)
                for n, t in ((2048, 1), (8192, 5))
            ],
            0.25,
        ),
        ("one small call from numpy", [record(small("numpy"), seconds=12e-6), record(small("torch"))], 12.0),
        ("one small call from torch", [record(small("numpy"))], None),
        ("bfloat16 with AMX: mean", [record(Cell("bfloat16", 1, 4, 512, 64, "bfloat16"))], None),
        ("bfloat16 without AMX: mean", [record(Cell("bfloat16", 1, 4, 512, 64, "bfloat16"), 3.0)], 3.0),
    ],
)
def test_goals(text: str, records: list[Record], value: float | None) -> None:
    assert found(text, report(*records)) == (None if value is None else pytest.approx(value))


def test_goals_of_first_calls() -> None:
    made = report(record(FORWARD), startup={"compile": 0.3, "cached": 0.01, "load_llvm": 0.04})
    assert found("first call of a problem", made) == 0.3
    assert found("first call in a new process", made) == 0.01


def test_sense_of_goals() -> None:
    at_least, at_most = goals.GOALS[0], goals.GOALS[-1]
    assert at_least.reached(goals.Found(1.0, "")) and not at_least.reached(goals.Found(0.99, ""))
    assert at_most.reached(goals.Found(0.02, "")) and not at_most.reached(goals.Found(0.021, ""))


def test_markdown_says_all() -> None:
    refused = record(BACKWARD) | {"status": "disagrees", "why": "dk: greatest error 1, allowed 0"}
    text = markdown(report(record(FORWARD, 2.0), record(CAUSAL, 0.5), refused), ["x-ratio.png"])
    for part in (
        "`anyflash bench --grid core`",
        "A\\|B (x86_64)",
        "openvino missing",
        "geometric mean 1.00 over 2 cells, 1 below 1",
        "**0.50**",
        "![x-ratio.png](x-ratio.png)",
        f"- {BACKWARD.name}: disagrees, dk: greatest error 1, allowed 0",
        "| onnxruntime A | disagrees | out: off | 3 cells |",
        "| openvino | missing | openvino is not installed | 3 cells |",
        "within 5% of it",
    ):
        assert part in text, part
    assert "not idle" not in text
    rows = [line for line in text.splitlines() if line.startswith(f"| {FORWARD.name} ")]
    cells = (FORWARD.name, "10 ms", "100 GFLOP/s", "50%", "torch flash", "2.00", "2.00–2.00")
    assert rows == ["| " + " | ".join([*cells, "2.00", "wrong", "missing"]) + " |"]


def test_a_busy_machine_is_named() -> None:
    made = report(record(FORWARD))
    made["machine"]["load_before"] = 3.0
    assert "not idle (load 3.00" in markdown(made)


def test_a_lacking_way_beside_one_that_took_part_is_not_listed() -> None:
    one = record(FORWARD)
    one["peers"].append(
        {"name": "torch flash, padded", "family": "torch flash", "status": "lacks", "why": "packed"}
    )
    assert "torch flash, padded" not in markdown(report(one))


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (8e-6, "8 µs"), (5e-8, "50 ns")]
)
def test_seconds(value: float, text: str) -> None:
    assert summary.seconds(value) == text


@pytest.mark.parametrize("name", grid.GRIDS)
def test_cells_of_a_grid_have_names_of_their_own(name: str) -> None:
    names = [cell.name for cell in grid.cells(name)]
    assert len(set(names)) == len(names)


def test_core_is_float32_of_two_shapes() -> None:
    assert {(c.dtype, c.shape) for c in grid.cells("core")} == {
        ("float32", "1x8x2048x64"),
        ("float32", "1x4x4096x128"),
    }
    assert {(c.variant, c.backward) for c in grid.cells("core")} == {
        (variant, backward) for variant in ("full", "causal") for backward in (False, True)
    }


def test_every_goal_has_cells_in_the_full_grid() -> None:
    """Whatever the figures are: a goal that no cell of the grid belongs to is a slip of the pen."""
    records = [record(cell) for cell in grid.cells("full")]
    made = report(*records, startup={"compile": 0.3, "cached": 0.01, "load_llvm": 0.04})
    for target in ("amx", "avx2"):
        made["machine"]["instruction_set"] = target
        missing = {goal.text for goal in goals.GOALS if goal.compute(made) is None}
        assert all(("AMX" in text) for text in missing)


def test_charts(tmp_path: Path) -> None:
    made = report(*(record(cell, 0.5 + i % 7) for i, cell in enumerate(grid.cells("full"))))
    written = _bench_charts.draw(made, tmp_path / "new", "cpu")
    assert [path.name for path in written] == ["cpu-ratio.png", "cpu-share.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_no_charts_of_nothing(tmp_path: Path) -> None:
    assert _bench_charts.draw(report(record(small("numpy"), None, share=None)), tmp_path, "cpu") == []


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = report(record(FORWARD))
    path = tmp_path / "new" / "bench.json"
    run.write(made, path)
    assert run.read(path) == json.loads(json.dumps(made))


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"format": 0})])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(InvalidCall, match=r"^from: "):
        run.read(path)


def test_reports_are_not_changed_by_rendering() -> None:
    made = report(record(FORWARD))
    before = copy.deepcopy(made)
    markdown(made)
    assert made == before
