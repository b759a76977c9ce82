"""Where the elements of a tile lie in shared memory, bit for bit.

TMA and wgmma lay a tile out in panels of as many columns as one swizzle row has bytes, one panel behind the
other, rows of a panel close together; in each the units of 16 bytes are exchanged as bits 7 and up of their
address say. All else here keeps buffers as plain arrays, for which it makes no difference: only a buffer that
is written in one layout and read in another shows where bytes lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from gpu.emulator.errors import Mismatch, Unknown


def places(layout: Any, shape: Sequence[int]) -> torch.Tensor:
    """The place of each element of a buffer of such tiles, counted in elements from its first byte."""
    if not isinstance(layout, gl.NVMMASharedLayout) or layout.transposed or not layout.swizzle_byte_width:
        raise Unknown(f"where elements lie in {layout}")
    size = layout.element_bitwidth // 8
    *outer, columns = shape[-layout.rank :]
    rows, width = torch.Size(outer).numel(), layout.swizzle_byte_width // size
    if rows % 8 or columns % width:
        raise Mismatch(f"a tile of {list(shape)} has no whole swizzle patterns of {layout}")
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    address = size * ((column // width * rows + row) * width + column % width)
    address ^= (address >> 7 & layout.swizzle_byte_width // 16 - 1) << 4
    tiles = torch.arange(torch.Size(shape[: -layout.rank]).numel())[:, None]
    return (tiles * (rows * columns) + (address // size).flatten()).view(list(shape))
