"""How the command line spells what several subcommands take."""

from __future__ import annotations

from typing import Annotated

import typer


def window(text: str | None) -> tuple[int | None, int | None] | None:
    """ "16,0" is (16, 0); a side that is left empty is unbounded: ",0" is (None, 0)."""
    if text is None:
        return None
    sides = text.split(",")
    if len(sides) != 2:
        raise typer.BadParameter(
            f"{text!r}: expected LEFT,RIGHT, for example 16,0 or ,0", param_hint="--window"
        )
    left, right = (_count(side, "--window") if side.strip() else None for side in sides)
    return left, right


def counts(text: str | None, option: str) -> list[int]:
    """ "20,30,14" as whole numbers that are at least 0."""
    return [] if text is None else [_count(part, option) for part in text.split(",")]


def block(text: str) -> tuple[int, int]:
    """ "16" is (16, 16), "16,32" is queries by keys."""
    sides = [_count(part, "--block") for part in text.split(",")]
    if len(sides) > 2 or not all(sides):
        raise typer.BadParameter(f"{text!r}: expected N or QUERIES,KEYS, at least 1", param_hint="--block")
    return sides[0], sides[-1]


def _count(text: str, option: str) -> int:
    if not text.strip().isdecimal():
        raise typer.BadParameter(f"{text!r}: expected a whole number of at least 0", param_hint=option)
    return int(text)


Queries = Annotated[int, typer.Option("--q", min=0, help="Queries.")]
Keys = Annotated[int | None, typer.Option("--k", min=0, help="Keys; without it as many as queries.")]
Causal = Annotated[bool, typer.Option("--causal", help="A query sees keys up to its own position.")]
Window = Annotated[
    str | None,
    typer.Option(
        "--window", metavar="LEFT,RIGHT", help="Keys from position - LEFT to position + RIGHT, inclusive."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
