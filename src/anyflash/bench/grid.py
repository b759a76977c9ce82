"""The grids: which cells a run measures. Adding a cell is adding a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from anyflash.bench.cells import Cell
from anyflash.core.errors import InvalidCall

_DIRECTIONS = (False, True)
# (batch, heads, length)
_LENGTHS = ((16, 8, 128), (4, 8, 512), (1, 16, 1024), (1, 8, 2048), (1, 4, 4096), (1, 1, 16384))
_MIXED = (17, 80, 256, 900, 40, 512, 1500, 128, 333, 64, 700, 205)


@dataclass(frozen=True, slots=True)
class Grid:
    """`peers` is how their names start; empty for all of them. `startup` says whether first calls are
    timed."""

    title: str
    cells: Callable[[], Iterator[Cell]]
    peers: tuple[str, ...] = ()
    startup: bool = False


def _core() -> Iterator[Cell]:
    for (heads, length, dim), variant, backward in product(
        ((8, 2048, 64), (4, 4096, 128)), ("full", "causal"), _DIRECTIONS
    ):
        yield Cell("float32", 1, heads, length, dim, variant=variant, backward=backward)


def _full() -> Iterator[Cell]:
    for dtype, dim, (batch, heads, length), variant, backward in product(
        ("float32", "bfloat16", "float16"), (64, 128), _LENGTHS, ("full", "causal"), _DIRECTIONS
    ):
        yield Cell(dtype, batch, heads, length, dim, dtype, variant, backward)
    for dtype, dim, variant, backward in product(
        ("float32", "bfloat16", "float16"), (32, 80, 96, 256), ("full", "causal"), _DIRECTIONS
    ):
        yield Cell(dtype, 1, 8, 2048, dim, dtype, variant, backward)
    for dtype, variant, backward in product(("float32", "bfloat16"), ("full", "causal"), _DIRECTIONS):
        yield Cell("GQA 8:1", 1, 16, 2048, 128, dtype, variant, backward, heads_kv=2)
    yield from _variants()
    yield from _decode()
    yield from _serve()
    yield from _small()
    for dtype, backward in product(("float32", "bfloat16"), _DIRECTIONS):
        for threads in (1, 2):
            yield Cell("threads", 1, 8, 2048, 128, dtype, backward=backward, threads=threads)


def _variants() -> Iterator[Cell]:
    rows = (
        # batch, heads, length, head_dim, variant
        (1, 4, 2048, 64, "window"),
        (1, 4, 4096, 64, "window"),
        (1, 4, 8192, 64, "window"),
        (1, 8, 4096, 64, "documents"),
        (1, 8, 2048, 64, "alibi"),
        (1, 8, 2048, 128, "softcap"),
        (1, 8, 2048, 64, "function"),
        (1, 8, 1024, 64, "bias"),
        (1, 8, 2048, 64, "dropout"),
    )
    for (batch, heads, length, dim, variant), backward in product(rows, _DIRECTIONS):
        yield Cell("variants", batch, heads, length, dim, "float32", variant, backward)
    for (batch, heads, length, dim, variant), backward in product(rows[2:6], _DIRECTIONS):
        yield Cell("variants", batch, heads, length, dim, "bfloat16", variant, backward)
    for dtype, variant, backward in product(("float32", "bfloat16"), ("full", "causal"), _DIRECTIONS):
        yield Cell("varlen", len(_MIXED), 8, max(_MIXED), 64, dtype, variant, backward, lengths=_MIXED)
    for dtype, dim, backward in product(("float32", "bfloat16"), (32, 8), _DIRECTIONS):
        yield Cell("Evoformer", 128, 4, 256, dim, dtype, "evoformer", backward)


def _decode() -> Iterator[Cell]:
    rows = (
        # batch, heads, heads_kv, queries, keys
        (1, 8, 8, 1, 1024),
        (1, 8, 8, 1, 8192),
        (1, 8, 8, 1, 65536),
        (1, 32, 4, 1, 1024),
        (1, 32, 4, 1, 8192),
        (1, 32, 4, 1, 65536),
        (1, 8, 8, 8, 8192),
        (1, 32, 4, 8, 8192),
        (8, 8, 8, 1, 8192),
        (8, 32, 4, 4, 8192),
        (32, 8, 8, 1, 2048),
        (32, 32, 4, 1, 4096),
    )
    for dtype, (batch, heads, heads_kv, queries, keys) in product(("float32", "bfloat16"), rows):
        yield Cell(
            "decode", batch, heads, queries, 128, dtype, heads_kv=heads_kv, seqlen_k=keys, measure="memory"
        )


def _serve() -> Iterator[Cell]:
    rows = (
        # batch, heads, heads_kv, queries
        (1, 32, 8, 1),
        (1, 32, 4, 1),
        (1, 32, 8, 4),
        (8, 32, 8, 1),
        (8, 32, 4, 1),
    )
    for dtype, (batch, heads, heads_kv, queries), cache in product(
        ("float32", "bfloat16"), rows, ("dense", 16, 256)
    ):
        yield Cell(
            "KV cache", batch, heads, queries, 128, dtype, "causal", heads_kv=heads_kv, seqlen_k=8192,
            cache=cache, measure="memory",
        )  # fmt: skip


def _small() -> Iterator[Cell]:
    for frontend in ("numpy", "torch"):
        yield Cell("small", 1, 1, 16, 64, frontend=frontend, measure="call")
        for length, variant in product((16, 32, 64, 128), ("full", "causal")):
            yield Cell("small", 1, 8, length, 64, variant=variant, frontend=frontend, measure="call")
    for length in (16, 128):
        yield Cell("small", 1, 8, length, 64, "bfloat16", measure="call")
        yield Cell("small", 1, 8, length, 64, backward=True, measure="call")
    yield Cell("small", 1, 1, 16, 64, backward=True, measure="call")


GRIDS: dict[str, Grid] = {
    "core": Grid("float32 beside torch's flash kernel", _core, peers=("torch flash",)),
    "full": Grid("every dtype, length and variant, decoding and small calls", _full, startup=True),
}


def cells(grid: str) -> list[Cell]:
    """The cells of a grid. Raises InvalidCall for a name that is none."""
    if grid not in GRIDS:
        raise InvalidCall("grid", repr(grid), f"one of {', '.join(GRIDS)}")
    return list(GRIDS[grid].cells())
