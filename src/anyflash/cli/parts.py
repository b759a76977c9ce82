"""`anyflash parts`: where the CPU kernel's time goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 160
_SHAPES = (
    ("float32", 1, 2, 2048, 64),
    ("float32", 1, 2, 2048, 128),
    ("float32", 32, 4, 128, 64),
    ("bfloat16", 1, 2, 2048, 64),
    ("bfloat16", 1, 2, 2048, 128),
    ("float16", 1, 2, 2048, 64),
)


def command(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each variant; the least counts.")] = 7,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Also write the table as Markdown.")
    ] = None,
) -> None:
    """Nanoseconds a score (one query, one key, one head) on one thread, and what leaving out each part saves.

    Parts overlap in the machine, so the savings of all do not add up to the whole.
    """
    from anyflash.bench import machine, parts
    from anyflash.semantics.problem import Problem, Program

    rows: list[tuple[str, str, dict[str, float]]] = []
    for dtype, batch, heads, length, dim in _SHAPES:
        problem = Problem(Program(), dtype, batch, heads, heads, length, length, dim, dim)
        name = f"{dtype} ({batch}, {heads}, {length}, {dim})"
        rows += [(name, direction, found) for direction, found in parts.measure(problem, repeats).items()]
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    for direction in ("forward", "backward"):
        mine = [(name, found) for name, where, found in rows if where == direction]
        table = Table(direction, *mine[0][1], title="ns a score, and what leaving out a part saves")
        for name, found in mine:
            table.add_row(name, *(f"{x:.2f}" for x in found.values()))
        console.print(table)
    if report is not None:
        report.write_text(_markdown(rows, machine.describe()), encoding="utf-8")


def _markdown(rows: list[tuple[str, str, dict[str, float]]], machine: dict[str, object]) -> str:
    lines = ["# Where the CPU kernel's time goes", "", "Written by `anyflash parts --report`.", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    for direction in ("forward", "backward"):
        mine = [(name, found) for name, where, found in rows if where == direction]
        lines += ["", f"## {direction}", "", "| " + " | ".join(["ns a score", *mine[0][1]]) + " |"]
        lines.append("|" + "---|" * (len(mine[0][1]) + 1))
        lines += [
            "| " + " | ".join([name, *(f"{x:.2f}" for x in found.values())]) + " |" for name, found in mine
        ]
    return "\n".join(lines) + "\n"
