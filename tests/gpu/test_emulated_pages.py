"""Keys of a cache by TMA under the emulator: chunks and panels are the tiles that wgmma multiplies."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
pytest.importorskip("torch")

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from anyflash.kernels.gluon.sequences import FAR, UNBOUNDED, WRAP
from gpu import emulated_pages as kernels
from gpu.emulator import emulate

_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
# page size (0: a dense cache), keys of a tile, head dim, stages, left padding
CASES = [
    (8, 64, 64, 2, False),
    (16, 64, 128, 2, False),
    (48, 32, 64, 1, False),
    (64, 64, 256, 2, False),
    (256, 64, 64, 3, False),
    (0, 64, 128, 2, False),
    (0, 32, 64, 2, True),
]


def boxes(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _GLUON[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def windows(cache: torch.Tensor, rows: int) -> TensorDescriptor:
    """Boxes of `rows` rows and 64 columns of (pages, slots, dim), as one head."""
    dim = cache.shape[-1]
    block = [1, 1, 1, rows, 64]
    layout = gl.NVMMASharedLayout.get_default_for(block, _GLUON[cache.dtype])
    shape, strides = [UNBOUNDED, UNBOUNDED, 1, FAR, dim], [WRAP - dim, dim, dim, dim, 1]
    return TensorDescriptor(cache, shape, strides, block, layout)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("page", "block_n", "dim", "stages", "padded"), CASES)
def test_tiles_of_a_cache(page: int, block_n: int, dim: int, stages: int, padded: bool, seed: int) -> None:
    torch.manual_seed(seed)
    lengths, bound = torch.tensor([3 * block_n - 7, 0, block_n + 1]), 4 * block_n
    slots = page or bound + 5
    each = math.ceil(bound / slots)
    pages = 3 * each + 1 if page else 3
    cache = torch.randn(pages, slots, dim).bfloat16()
    table = torch.randperm(pages)[: 3 * each].view(3, each).int() if page else torch.arange(3)[:, None].int()
    padding = torch.tensor([5, 0, 2]) if padded else torch.zeros(3, dtype=torch.int64)
    q, found = torch.randn(64, dim).bfloat16(), torch.full((192, bound), float("nan"))
    wanted = torch.zeros(3, 64, bound, dtype=torch.float64)
    seen = torch.zeros(pages, slots, dtype=torch.bool)
    for b, length in enumerate(lengths.tolist()):
        at = torch.arange(length) + padding[b]
        where = table[b][at // slots].long(), at % slots
        wanted[b, :, :length] = q.double() @ cache[where].double().T
        seen[where] = True
    cache[~seen] = float("nan")
    for b, length in enumerate(lengths.tolist()):
        # Where no key is, anything may stand.
        table[b, math.ceil(length / slots) if page else 1 :] = -(2**30)
    rows = math.gcd(page, block_n) if page else block_n
    emulate(
        kernels.keys_times,
        (3,),
        boxes(q, [64, dim]),
        windows(cache, rows),
        boxes(found, [64, block_n]),
        lengths,
        bound,
        (table if page else None, each, 1, pages, slots, slots, padding if padded else None, each * slots),
        seed=seed,
        PAGE=page,
        PADDED=padded,
        BLOCK_N=block_n,
        STAGES=stages,
    )
    error = (found.view(3, 64, bound) - wanted).abs().max()
    assert error <= 2 * torch.finfo(torch.float32).eps * wanted.abs().max()


@pytest.mark.parametrize(("chunked", "by_panels"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("rows", [8, 16, 64])
def test_chunks_are_the_tile(rows: int, chunked: bool, by_panels: bool) -> None:
    """Loaded in another order they are another tile: the emulator knows where bytes lie."""
    torch.manual_seed(0)
    # Whole numbers: sums are exact.
    q, k = (torch.randint(-8, 9, (64, 128)).half() for _ in range(2))
    found = torch.empty(64, 64)
    arguments: tuple[Any, ...] = boxes(q, [64, 128]), boxes(k, [rows, 64]), boxes(k, [64, 128])
    emulate(kernels.boxes_or_tile, (1,), *arguments, boxes(found, [64, 64]), chunked, by_panels)
    same = torch.equal(found, (q.double() @ k.double().T).float())
    assert same is (by_panels or rows == 64)
