"""`explain` says what would run, counts tiles as a written-out mask would, and computes no attention."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import anyflash as af
from anyflash.backends import reference, registry
from anyflash.core.device import Device
from anyflash.dispatch.explain import Tiles, count_tiles, explain
from anyflash.frontends import base
from anyflash.frontends.numpy_ import FRONTEND
from anyflash.semantics.describe import describe_program
from anyflash.semantics.mask import as_mask
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Problem

BATCH, HEADS = 2, 4
LENGTHS = ((100, 130), (0, 40), (37, 0), (50, 3))


def question(q_len: int, k_len: int, **keywords: Any) -> tuple[Problem, Operands]:
    q, k = np.zeros((BATCH, q_len, HEADS, 8), np.float32), np.zeros((BATCH, k_len, 2, 8), np.float32)
    made = describe_program(q.shape, k.shape, lambda _, array: FRONTEND.dtype(array), **keywords)
    return base.describe_request(
        FRONTEND, base.Request(made.program, q, k, k, "bshd", made.tables, made.names)
    )


def counted(allowed: np.ndarray, block_q: int, block_k: int) -> tuple[int, int, int]:
    """(total, empty, full) of a written-out mask (batch, heads, q, k). A full tile is also whole."""
    total = empty = full = 0
    q_len, k_len = allowed.shape[-2:]
    for plane in (plane for planes in allowed for plane in planes):
        for row in range(0, q_len, block_q):
            for key in range(0, k_len, block_k):
                tile = plane[row : row + block_q, key : key + block_k]
                total, empty = total + 1, empty + (not tile.any())
                full += bool(tile.all()) and key + block_k <= k_len
    return total, empty, full


DOCUMENTS = np.repeat([0, 1, 2], [40, 50, 40])
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (20, 3)},
    "prefix": {"mask": af.masks.prefix(33) | af.masks.causal()},
    "documents": {"mask": af.masks.documents(DOCUMENTS), "causal": True},
    "one head": {"mask": lambda at: at.head == 1},
    "batch and head": {"mask": lambda at: (at.batch == 1) & (at.head < 2) & (at.k <= at.q)},
}


@pytest.mark.parametrize("blocks", [(16, 16), (48, 64)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_tiles(mask: str, blocks: tuple[int, int]) -> None:
    q_len, k_len = 100, 130
    keywords = MASKS[mask]
    whole = as_mask(keywords.get("mask", lambda at: True))
    if keywords.get("causal"):
        whole = whole & af.masks.causal()
    if "window" in keywords:
        whole = whole & af.masks.window(*keywords["window"])
    tiles = count_tiles(*question(q_len, k_len, **keywords), *blocks)
    assert tiles is not None
    total, empty, full = counted(whole.allowed(q_len, k_len, BATCH, HEADS), *blocks)
    assert (tiles.total, tiles.empty, tiles.full) == (total, empty, full)
    assert tiles.empty + tiles.partial + tiles.full == tiles.total


def test_tiles_of_packed_sequences() -> None:
    """Each sequence has tiles of its own; the grid of the longest is not counted for the others."""
    q_lens, k_lens = zip(*LENGTHS, strict=True)
    q, k = np.zeros((sum(q_lens), 2, 8), np.float32), np.zeros((sum(k_lens), 2, 8), np.float32)
    starts_q, starts_k = (np.cumsum([0, *lens]).astype(np.int32) for lens in (q_lens, k_lens))
    tiles = af.explain(q, k, k, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, causal=True).tiles
    assert tiles is not None
    sides = tiles.block_q, tiles.block_k
    alone = [counted(af.masks.causal().allowed(*lens)[:, [0, 0]], *sides) for lens in LENGTHS]
    assert (tiles.total, tiles.empty, tiles.full) == tuple(map(sum, zip(*alone, strict=True)))


def test_large_grid_is_coarsened() -> None:
    one = np.zeros((1, 1, 4, 8), np.float32)
    q = np.broadcast_to(one, (1, 1 << 20, 4, 8))
    tiles = af.explain(q, q, q, causal=True).tiles
    assert tiles is not None
    assert tiles.block_q > 64
    assert tiles.full + tiles.partial + tiles.empty == tiles.total <= 1 << 21


def test_tables_out_of_reach() -> None:
    problem, operands = question(100, 130, mask=af.masks.documents(DOCUMENTS))
    for table in operands.tables:
        table.device = Device("cuda")
    assert count_tiles(problem, operands, 64, 64) is None


def test_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any) -> None:
        raise AssertionError("explain ran a kernel")

    for entry in registry.entries().values():
        if entry.backend is not None:
            monkeypatch.setattr(type(entry.backend), "forward", computed)
    q = np.zeros((1, 8, 2, 16), np.float32)
    assert af.explain(q, q, q, causal=True, backend="reference").backend == "reference"
    assert af.explain(q, q, q, causal=True).tiles is not None


def test_report() -> None:
    q = np.zeros((2, 128, 4, 8), np.float32)
    said = af.explain(
        q, q, q, causal=True, softcap=30, bias=np.zeros((1, 1, 128, 128), np.float32), backend="reference"
    )
    lines = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in str(said).splitlines()[1:])
    assert str(said).splitlines()[0] == (
        "attention of q (2, 128, 4, 8), k (2, 128, 4, 8), v (2, 128, 4, 8) in float32 on cpu, "
        "with a score program, with a mask"
    )
    assert lines["backend"] == "reference"
    assert lines["mask"] == "k <= q"
    assert lines["score"] == "30.0 * tanh(score / 30.0) + table0[row, k]"
    assert lines["tiles"] == str(Tiles(64, 64, 32, 8, 16, 8))
    pairs, array, bias, lse = 2 * 4 * 128 * 128 * 3 / 4, 2 * 128 * 4 * 8 * 4, 128 * 128 * 4, 2 * 4 * 128 * 4
    forward, backward = 2 * pairs * (8 + 8), 2 * pairs * (3 * 8 + 2 * 8)
    assert (said.cost.flops_forward, said.cost.flops_backward) == (forward, backward)
    assert lines["operations"].startswith(
        f"{forward / 1e6:.3g} MFLOP forward, {backward / 1e6:.3g} MFLOP backward"
    )
    assert said.cost.bytes_forward == 4 * array + bias + 3 * lse
    assert lines["bytes"].startswith(f"{said.cost.bytes_forward / 1e3:.3g} kB forward")
    assert set(said.declined) == set(registry.entries()) - {"reference"}


def test_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that nothing can run is explained, with every reason."""
    for entry in registry.entries().values():
        if entry.backend is not None:
            monkeypatch.setattr(type(entry.backend), "available", lambda *_: None)
            monkeypatch.setattr(type(entry.backend), "decline", lambda *_: ["not today"])
    q = np.zeros((1, 8, 2, 16), np.float32)
    said = af.explain(q, q, q)
    assert said.backend is None
    assert "none can run this call" in str(said)
    assert set(said.declined) == set(registry.entries())
    assert all("not today" in why for why in said.declined.values())


def test_other_device() -> None:
    problem, operands = question(8, 8)
    operands.q.device = Device("metal", 0)
    said = explain(problem, operands)
    assert said.backend is None
    assert reference.BACKEND.decline(problem, Device("metal", 0))[0] in said.declined["reference"]
