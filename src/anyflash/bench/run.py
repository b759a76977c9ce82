"""A run: the cells of a grid, one after the other, and everything found in one JSON document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyflash.bench import grid, machine, startup
from anyflash.bench.cells import Cell
from anyflash.bench.measure import Record, measure
from anyflash.bench.peers import registry
from anyflash.bench.peers.base import Peer
from anyflash.bench.timing import FULL, QUICK
from anyflash.core.errors import InvalidCall
from anyflash.core.threads import usable_cores

FORMAT = 1
Report = dict[str, Any]
# Takes the number of the cell, the cell, what is being done, and the part of the cell that is done.
Progress = Callable[[int, Cell, str, float], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure. `only` is a regular expression that a cell's name must contain; `peers` are the
    beginnings of peers' names, empty for those of the grid; `threads` None for every usable core."""

    grid: str = "core"
    only: str | None = None
    peers: Sequence[str] = ()
    threads: int | None = None
    quick: bool = False


def select(wanted: Wanted) -> list[Cell]:
    """Raises InvalidCall if nothing is left, or `only` is no regular expression."""
    cells = grid.cells(wanted.grid)
    if wanted.only is not None:
        try:
            pattern = re.compile(wanted.only)
        except re.error as error:
            raise InvalidCall("only", repr(wanted.only), f"a regular expression ({error})") from error
        cells = [cell for cell in cells if pattern.search(cell.name)]
    if not cells:
        raise InvalidCall(
            "only",
            repr(wanted.only),
            f"a pattern found in the name of a cell of grid {wanted.grid}",
            "--list shows them",
        )
    return cells


def run(
    wanted: Wanted, progress: Progress, keep: Path | None = None, earlier: Report | None = None
) -> Report:
    """Measure the selected cells. `keep` is rewritten after each of them, so that a run that is stopped
    leaves what it has found; given as `earlier`, that is taken up again, on the same machine with the same
    versions and effort, or it is an InvalidCall."""
    cells = select(wanted)
    peers = _peers(wanted.peers or grid.GRIDS[wanted.grid].peers)
    threads = wanted.threads or usable_cores()
    effort = QUICK if wanted.quick else FULL
    report: Report = {
        "format": FORMAT,
        "grid": wanted.grid,
        "only": wanted.only,
        "quick": wanted.quick,
        "threads": threads,
        "effort": asdict(effort),
        "peers": [peer.name for peer in peers],
        "machine": machine.describe(),
        "startup": startup.measure() if grid.GRIDS[wanted.grid].startup and wanted.only is None else None,
        "cells": [],
        "resumed": [],
    }
    if earlier is not None:
        _take_up(report, earlier)
    measured = {record["name"] for record in report["cells"]}
    place = {cell.name: i for i, cell in enumerate(grid.cells(wanted.grid))}
    for number, cell in enumerate(cells):
        if cell.name in measured:
            continue
        record = measure(
            cell, effort, threads, peers, lambda what, part, n=number, c=cell: progress(n, c, what, part)
        )
        report["cells"].append(record)
        report["cells"].sort(key=lambda found: place[found["name"]])
        if keep is not None:
            write(report, keep)
    return report


def _take_up(report: Report, earlier: Report) -> None:
    """Put what an earlier run found in its place."""
    same = ("grid", "quick", "threads", "peers")
    then, now = earlier["machine"], report["machine"]
    differing = [key for key in same if earlier[key] != report[key]]
    differing += [key for key in ("processor", "cores", "versions") if then[key] != now[key]]
    if differing:
        raise InvalidCall("resume", f"a run with other {', '.join(differing)}", "one like this")
    report["resumed"] = [*earlier.get("resumed", []), now["date"]]
    report["machine"], report["startup"] = then, earlier["startup"] or report["startup"]
    report["cells"] = list(earlier["cells"])


def write(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Report:
    """A report that `write` wrote. Raises InvalidCall for anything else."""
    try:
        report: Report = json.loads(path.read_text(encoding="utf-8"))
        found = report["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCall("from", str(path), f"a report of `anyflash bench` ({error})") from error
    if found != FORMAT:
        raise InvalidCall("from", f"{path}, format {found}", f"format {FORMAT}")
    return report


def missing(report: Report) -> list[str]:
    """Names of the cells that the run was to measure and has not, because it was stopped."""
    wanted = select(Wanted(report["grid"], report["only"]))
    measured = {record["name"] for record in report["cells"]}
    return [cell.name for cell in wanted if cell.name not in measured]


def refused(report: Report) -> list[Record]:
    """Cells in which ours failed or disagreed."""
    return [record for record in report["cells"] if record["status"] != "ok"]


def _peers(beginnings: Sequence[str]) -> list[Peer]:
    found = [p for p in registry.peers() if not beginnings or any(p.name.startswith(b) for b in beginnings)]
    unknown = [b for b in beginnings if not any(p.name.startswith(b) for p in registry.peers())]
    if unknown:
        known = ", ".join(peer.name for peer in registry.peers())
        raise InvalidCall("peers", repr(unknown[0]), f"the beginning of one of: {known}")
    return found
