"""Tiles of the Triton kernels for the GPU that is here: proposed, compiled, checked, timed, and written down.

    python benchmarks/tune_gpu.py OUT [--parts forward,..] [--widths 64,128] [--itemsizes 2,4] [--write]
    python benchmarks/tune_gpu.py OUT --offline sm_90      only what needs no GPU: proposals that compile well

For each part, row of the table and element size: tiles, warps and stages are proposed; those that exceed the
device's shared memory, or spill more registers than the table's own choice, are dropped, on all cores and
without the device; cases of the contract run on each of the rest, in poisoned memory and repeated, and what
fails any is dropped, too; those that are right take turns on the clock. The fastest is the entry.
OUT/ARCH.json holds the entries with their times; --write puts them into the package (kernels/triton/tables),
which schedule.py reads. Nothing is searched for at run time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
try:
    import anyflash  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from anyflash.kernels.triton import schedule, tuned
from anyflash.kernels.triton.schedule import Part, Tiles

DTYPES = {2: "bfloat16", 4: "float32"}
# Cases of the contract's table, each with the row's head_dim in place of its own.
CASES = ("plain", "causal", "gqa_causal", "window", "varlen", "softcap", "bias", "sinks", "lens_129_257")
SIDES, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
# A change must be worth it: the table's own tiles stay unless another is faster by this factor.
GAIN = 1.02


@dataclass(frozen=True)
class Row:
    """One row to be tuned: `width` is the greatest of its class."""

    part: Part
    width: int
    itemsize: int

    @property
    def dim(self) -> int:
        """A head_dim of the row: the widest that models have."""
        return min(self.width, 576)

    @property
    def key(self) -> str:
        return tuned.key(self.part, self.width, self.itemsize)


@dataclass(frozen=True)
class Verdict:
    """What came of the proposals of a row. `wrong` and `dropped`: why, by tiles."""

    chosen: Tiles
    milliseconds: dict[str, float]
    wrong: dict[str, str]
    dropped: dict[str, str]


def proposals(row: Row, arch: str) -> list[Tiles]:
    """The table's own choice, then all tiles that may have room."""
    own = schedule.tiles(row.part, arch, row.dim, row.dim, row.itemsize)
    width = schedule.padded(row.dim)
    found = [own]
    for block_m, block_n, warps, stages in product(SIDES, SIDES, WARPS, STAGES):
        tiles = Tiles(block_m, block_n, warps, stages)
        # 16 rows a warp at least, or warps share what one would do.
        still = block_n if row.part == "backward_dkv" else block_m
        if tiles == own or still < 16 * min(warps, 4) // 2 or block_m * block_n < 512:
            continue
        if schedule.shared_bytes(row.part, tiles, width, width, row.itemsize) <= schedule.limit(arch):
            found.append(tiles)
    return found


def compile_one(row: Row, arch: str, tiles: Tiles) -> dict[str, int] | str:
    """Figures of a causal launch with these tiles, or what the compiler said."""
    from anyflash.kernels.triton import offline
    from gpureport.calls import Case
    from gpureport.warm import launches

    case = Case(DTYPES[row.itemsize], row.dim, 4096, 4096, True, "plain", 1, 8, 8)
    try:
        with tuned.trying(arch, row.key, (tiles.block_m, tiles.block_n, tiles.warps, tiles.stages)):
            found = launches(case, arch, row.part != "forward")
        (made,) = [each for each in found if each.name == row.part]
        return offline.compiled(made.kernel, arch, *made.arguments, **made.constants).as_dict()
    except Exception as error:  # noqa: BLE001 - tiles that a compiler refuses are no proposal
        return f"{type(error).__name__}: {error}"[-300:]


def compile_all(row: Row, arch: str, wanted: Sequence[Tiles]) -> dict[Tiles, dict[str, int] | str]:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = pool.map(compile_one, [row] * len(wanted), [arch] * len(wanted), wanted)
        return dict(zip(wanted, found, strict=True))


def survivors(
    own: Tiles, figures: dict[Tiles, dict[str, int] | str], arch: str
) -> tuple[list[Tiles], dict[str, str]]:
    """Tiles that have room and spill no more than the table's own; why the others are dropped."""
    first = figures[own]
    allowed = first["spilled"] if isinstance(first, dict) else 0
    kept, dropped = [], {}
    for tiles, found in figures.items():
        if isinstance(found, str):
            dropped[str(tiles)] = found
        elif found["shared"] > schedule.limit(arch):
            dropped[str(tiles)] = f"{found['shared']} bytes of shared memory"
        elif found["spilled"] > allowed:
            dropped[str(tiles)] = f"{found['spilled']} bytes spilled"
        else:
            kept.append(tiles)
    return kept, dropped


def select(
    own: Tiles,
    figures: dict[Tiles, dict[str, int] | str],
    arch: str,
    complaints: Callable[[Tiles], Sequence[str]],
    clock: Callable[[Sequence[Tiles]], dict[Tiles, float]],
) -> Verdict:
    """The fastest of the tiles that compile well and are right; the table's own unless another gains enough.

    complaints  what the contract says of a kernel with these tiles; nothing if it is right
    clock       milliseconds of each, taken in turns
    """
    kept, dropped = survivors(own, figures, arch)
    wrong, right = {}, []
    for tiles in kept:
        if said := complaints(tiles):
            wrong[str(tiles)] = said[0]
        else:
            right.append(tiles)
    if not right:
        raise RuntimeError(f"no tiles are right: {wrong or dropped}")
    taken = clock(right)
    best = min(right, key=lambda tiles: taken[tiles])
    if own in taken and taken[own] < GAIN * taken[best]:
        best = own
    return Verdict(best, {str(tiles): ms for tiles, ms in taken.items()}, wrong, dropped)


def contract_complaints(row: Row, arch: str) -> Callable[[Tiles], list[str]]:
    """Runs the contract's cases with the row's head_dim on the GPU."""
    from anyflash.contract.run import run
    from anyflash.contract.table import table

    by_id = {case.id: case for case in table()}
    wanted = [
        replace(by_id[f"float32-{name}"], dtype=DTYPES[row.itemsize], dims=(row.dim, row.dim))
        for name in CASES
    ]
    directions = ("forward",) if row.part == "forward" else ("forward", "backward")

    def complaints(tiles: Tiles) -> list[str]:
        with tuned.trying(arch, row.key, _as_entry(tiles)):
            for case in wanted:
                try:
                    said = run(case, "triton", directions).failures
                except Exception as error:  # noqa: BLE001 - a launch that fails is a reason, too
                    said = [f"{type(error).__name__}: {error}"]
                if said:
                    return [f"{case.id}: {said[0]}"]
        return []

    return complaints


def device_clock(row: Row, arch: str) -> Callable[[Sequence[Tiles]], dict[Tiles, float]]:
    """Times calls of 4096 causal rows with each of the tiles in turn, on the GPU."""
    from gpureport.calls import Case, make
    from gpureport.place import Place

    heads = max(1, 2048 // row.dim)
    case = Case(DTYPES[row.itemsize], row.dim, 4096, 4096, True, "plain", 4, heads, heads)

    def clock(wanted: Sequence[Tiles]) -> dict[Tiles, float]:
        made = make(case, "cuda")
        results = made.call.forward(made.call.results())

        def once(tiles: Tiles) -> None:
            with tuned.trying(arch, row.key, _as_entry(tiles)):
                if row.part == "forward":
                    made.call.forward(results)
                else:
                    made.call.backward(results, made.dout)

        calls = {str(tiles): lambda t=tiles: once(t) for tiles in wanted}
        taken = Place(dry=False, quick=False).milliseconds(calls, 0.1 * len(wanted))
        return {tiles: taken[str(tiles)] for tiles in wanted}

    return clock


def _as_entry(tiles: Tiles) -> tuple[int, int, int, int]:
    return tiles.block_m, tiles.block_n, tiles.warps, tiles.stages


def entry(verdict: Verdict, device: str) -> dict[str, Any]:
    """What is written down of a row."""
    fastest = sorted(verdict.milliseconds.items(), key=lambda pair: pair[1])[:5]
    return {
        "tiles": list(astuple(verdict.chosen)),
        "milliseconds": verdict.milliseconds[str(verdict.chosen)],
        "next": dict(fastest),
        "wrong": verdict.wrong,
        "device": device,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def merge(path: Path, found: dict[str, Any]) -> None:
    """Put entries into a table's file, beside those that it has."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept | found, indent=1, sort_keys=True) + "\n")


def rows(parts: Iterable[str], widths: Sequence[int], itemsizes: Iterable[int]) -> list[Row]:
    return [
        Row(part, width, size)  # type: ignore[arg-type]
        for part in parts
        for width in schedule.classes(part)  # type: ignore[arg-type]
        if not widths or width in widths
        for size in itemsizes
    ]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default=",".join(schedule.PARTS))
    parser.add_argument("--widths", type=_numbers, default=[])
    parser.add_argument("--itemsizes", type=_numbers, default=[2, 4])
    parser.add_argument("--offline", metavar="ARCH", help="compile for this architecture, and no more")
    parser.add_argument("--write", action="store_true", help="put the entries into the package")
    given = parser.parse_args()
    wanted = rows(given.parts.split(","), given.widths, given.itemsizes)
    if given.offline:
        for row in wanted:
            tried = proposals(row, given.offline)
            figures = compile_all(row, given.offline, tried)
            kept, dropped = survivors(tried[0], figures, given.offline)
            record = {"kept": {str(t): figures[t] for t in kept}, "dropped": dropped}
            merge(given.out / f"{given.offline}-compiled.json", {row.key: record})
        return 0
    import torch

    from anyflash.kernels.triton.device import present

    if not torch.cuda.is_available():
        sys.stderr.write("torch sees no GPU here; --offline ARCH needs none\n")
        return 2
    arch, device = present(), torch.cuda.get_device_name()
    for row in wanted:
        tried = proposals(row, arch)
        figures = compile_all(row, arch, tried)
        verdict = select(tried[0], figures, arch, contract_complaints(row, arch), device_clock(row, arch))
        merge(given.out / f"{arch}.json", {row.key: entry(verdict, device)})
        if given.write:
            merge(tuned.FOLDER / f"{arch}.json", {row.key: entry(verdict, device)})
        sys.stdout.write(f"{row.key}: {verdict.chosen}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
