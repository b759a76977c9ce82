"""The tuner without a GPU: what it proposes, drops, refuses and chooses, with a clock and a contract of our
own, and its compiler for sm_90."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)
pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tune_gpu
from anyflash.kernels.triton import schedule, tuned
from anyflash.kernels.triton.schedule import Tiles
from tune_gpu import Row, select

OWN, FAST, WRONG, SPILLS, WIDE = (Tiles(64, 32 * i, 4, 1) for i in range(1, 6))
GOOD = {"shared": 1000, "registers": 200, "spilled": 0, "products": 8}
FIGURES = {
    OWN: GOOD,
    FAST: GOOD,
    WRONG: GOOD,
    SPILLS: GOOD | {"spilled": 8},
    WIDE: GOOD | {"shared": 10**6},
    Tiles(16, 16, 8, 4): "CompilationError: as if it could not be compiled",
}
TIMES = {OWN: 10.0, FAST: 5.0, WRONG: 1.0, SPILLS: 0.5, WIDE: 0.2}


def contract(tiles: Tiles) -> Sequence[str]:
    return ["out: greatest error 1"] if tiles == WRONG else []


def clock(wanted: Sequence[Tiles]) -> dict[Tiles, float]:
    return {tiles: TIMES[tiles] for tiles in wanted}


def test_the_fastest_that_is_right() -> None:
    found = select(OWN, FIGURES, "sm_90", contract, clock)
    assert found.chosen == FAST
    assert found.wrong == {str(WRONG): "out: greatest error 1"}
    assert set(found.dropped) == {str(SPILLS), str(WIDE), str(Tiles(16, 16, 8, 4))}
    assert set(found.milliseconds) == {str(OWN), str(FAST)}, "what is wrong is not timed"


def test_a_small_gain_changes_nothing() -> None:
    near = lambda tiles: {t: 10.0 - 0.1 * (t == FAST) for t in tiles}
    found = select(OWN, FIGURES, "sm_90", contract, near)
    assert found.chosen == OWN


def test_own_tiles_may_be_wrong() -> None:
    found = select(OWN, FIGURES, "sm_90", lambda t: contract(t) or ["bad"] * (t == OWN), clock)
    assert found.chosen == FAST


def test_nothing_right() -> None:
    with pytest.raises(RuntimeError, match="no tiles are right"):
        select(OWN, FIGURES, "sm_90", lambda tiles: ["bad"], clock)


def test_what_spills_with_its_own_tiles() -> None:
    """There a proposal may spill as much, and no more."""
    figures = {OWN: GOOD | {"spilled": 8}, FAST: GOOD | {"spilled": 8}, WRONG: GOOD | {"spilled": 12}}
    kept, dropped = tune_gpu.survivors(OWN, figures, "sm_90")
    assert kept == [OWN, FAST]
    assert dropped == {str(WRONG): "12 bytes spilled"}


@pytest.mark.parametrize("arch", ["sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("row", tune_gpu.rows(schedule.PARTS, [], [2, 4]), ids=lambda row: row.key)
def test_proposals_have_room(row: Row, arch: str) -> None:
    found = tune_gpu.proposals(row, arch)
    assert found[0] == schedule.tiles(row.part, arch, row.dim, row.dim, row.itemsize)
    assert len(set(found)) == len(found)
    width = schedule.padded(row.dim)
    for tiles in found[1:]:
        assert schedule.shared_bytes(row.part, tiles, width, width, row.itemsize) <= schedule.limit(arch)


def test_an_entry_is_what_schedule_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, read, and used for its own row alone."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.entries.cache_clear()
    row = Row("forward", 128, 2)
    default = schedule.tiles("forward", "sm_90", 128, 128, 2)
    verdict = select(OWN, FIGURES, "sm_90", contract, clock)
    tune_gpu.merge(tmp_path / "sm_90.json", {"backward_dq 64 2": {"tiles": [16, 16, 4, 1]}})
    tune_gpu.merge(tmp_path / "sm_90.json", {row.key: tune_gpu.entry(verdict, "a device")})
    written = json.loads((tmp_path / "sm_90.json").read_text())[row.key]
    assert written["wrong"]
    assert written["device"] == "a device"
    tuned.entries.cache_clear()
    try:
        assert schedule.tiles("forward", "sm_90", 96, 96, 2) == FAST
        assert schedule.tiles("backward_dq", "sm_90", 64, 64, 2) == Tiles(16, 16, 4, 1)
        assert schedule.tiles("forward", "sm_90", 128, 128, 4) != FAST
        assert schedule.tiles("forward", "sm_80", 128, 128, 2) != FAST
    finally:
        monkeypatch.undo()
        tuned.entries.cache_clear()
    assert schedule.tiles("forward", "sm_90", 128, 128, 2) == default


def test_trying_is_undone() -> None:
    before = schedule.tiles("forward", "sm_90", 128, 128, 2)
    with tuned.trying("sm_90", "forward 128 2", (16, 16, 4, 1)):
        assert schedule.tiles("forward", "sm_90", 128, 128, 2) == Tiles(16, 16, 4, 1)
    assert schedule.tiles("forward", "sm_90", 128, 128, 2) == before


def test_compiler() -> None:
    """For sm_90: tiles that fit, and some that are too many registers for 4 warps."""
    row = Row("forward", 64, 2)
    fits = tune_gpu.compile_one(row, "sm_90", Tiles(64, 32, 4, 2))
    assert isinstance(fits, dict)
    assert fits["products"] > 0
    assert fits["spilled"] == 0
    heavy = tune_gpu.compile_one(row, "sm_90", Tiles(128, 128, 4, 1))
    assert isinstance(heavy, dict)
    assert heavy["spilled"] > 0
    kept, dropped = tune_gpu.survivors(
        Tiles(64, 32, 4, 2), {Tiles(64, 32, 4, 2): fits, Tiles(128, 128, 4, 1): heavy}, "sm_90"
    )
    assert kept == [Tiles(64, 32, 4, 2)]
    assert "bytes spilled" in next(iter(dropped.values()))


def test_cases_of_the_contract() -> None:
    """They are all there, for the row's width: none is missed by a name that changed."""
    assert callable(tune_gpu.contract_complaints(Row("forward", 128, 2), "sm_90"))
