"""`anyflash draw`: a mask, and the class of each of its tiles."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from anyflash.cli import _drawing
from anyflash.cli._options import Causal, Json, Keys, Queries, Window, block, counts, window
from anyflash.semantics import mask as masks
from anyflash.semantics.expr import At
from anyflash.semantics.text import bind
from anyflash.semantics.tiles import Dims, tile_classes

_MAX_CELLS = 4_000_000


def command(
    q: Queries = 64,
    k: Keys = None,
    causal: Causal = False,
    window_text: Window = None,
    prefix: Annotated[
        int | None, typer.Option("--prefix", min=0, help="The first keys are seen by all, besides --causal.")
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option("--documents", metavar="N,N,...", help="Lengths of documents; a query sees its own."),
    ] = None,
    block_text: Annotated[str, typer.Option("--block", metavar="N | QUERIES,KEYS", help="Tile size.")] = "16",
    out: Annotated[Path | None, typer.Option("--out", help="Write an image (png, svg, pdf).")] = None,
    as_json: Json = False,
) -> None:
    """Draw a mask: which query sees which key, and which tiles a kernel skips, masks or runs bare."""
    keys = q if k is None else k
    mask = mask_of(causal, window(window_text), prefix, counts(documents, "--documents"), keys)
    picture = picture_of(mask, q, keys, block(block_text))
    if out is not None:
        _drawing.save(picture, out, repr(mask))
    if as_json:
        found = {"mask": repr(mask), "q": q, "k": keys, "block": picture.block, "tiles": picture.counts()}
        typer.echo(json.dumps(found, indent=2))
        return
    if out is None:
        console = Console()
        console.print(_drawing.terminal(picture, console.width), no_wrap=True, overflow="crop", end="")
    typer.echo(picture.summary())


def mask_of(
    causal: bool,
    window: tuple[int | None, int | None] | None,
    prefix: int | None,
    documents: list[int],
    keys: int,
) -> masks.Mask:
    """The mask that the options spell. A prefix widens `causal`; all else narrows.

    Raises typer.BadParameter if the documents do not add up to the keys.
    """
    parts: list[masks.Mask] = []
    if prefix is not None:
        parts.append(masks.prefix(prefix) | masks.causal() if causal else masks.prefix(prefix))
    elif causal:
        parts.append(masks.causal())
    if window is not None:
        parts.append(masks.window(*window))
    if documents:
        if sum(documents) != keys:
            found = f"the lengths add up to {sum(documents)}; expected {keys}, the keys"
            raise typer.BadParameter(found, param_hint="--documents")
        parts.append(masks.documents(np.repeat(np.arange(len(documents), dtype=np.int32), documents)))
    return reduce(lambda a, b: a & b, parts) if parts else masks.window()


def picture_of(mask: masks.Mask, q_len: int, k_len: int, tile: tuple[int, int]) -> _drawing.Picture:
    """The cells of the mask, unless there are millions, and the classes that kernels give its tiles."""
    cells = mask.allowed(q_len, k_len)[0, 0] if q_len * k_len <= _MAX_CELLS else None
    (expr,), tables = bind([mask(At())])
    classes = tile_classes(
        expr, Dims(1, 1, q_len, k_len), [np.asarray(table.array) for table in tables], *tile
    )
    return _drawing.Picture(q_len, k_len, tile, classes[0, 0], cells)
