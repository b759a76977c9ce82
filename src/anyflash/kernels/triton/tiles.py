"""Tiles of q, k, v and out.

Widths of a tensor core are powers of two, head dims are not: a row of D elements is held as two pieces, the
largest power of two in D and the smallest that covers the rest (none if the rest is 0): 96 = 64 + 32,
576 = 512 + 64, 80 = 64 + 16. Products are summed over the pieces, sums are kept by piece. A piece of width 0
is stood in for by the first one and is never used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.narrow import rounded, widened

# Triton 3.6 takes no text as a default of device code, but a constant that holds one.
AS_IT_IS = tl.constexpr("")


@triton.jit
def piece(base, first_row, end_row, row_step, dim_step, EDGE: tl.constexpr, FIRST: tl.constexpr,
          WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
          FORMAT: tl.constexpr = AS_IT_IS):  # fmt: skip
    """(ROWS, WIDTH): rows from first_row and columns from FIRST; 0 past DIM, and past end_row if EDGE. FORMAT
    is that of 8-bit floats to be widened."""
    rows = tl.arange(0, ROWS)
    columns = FIRST + tl.arange(0, WIDTH)
    # The tile's corner in 64 bits; within a tile 32 are enough.
    corner = base + whole(first_row) * row_step
    at = corner + (rows[:, None] * row_step + columns[None, :] * dim_step)
    if EDGE:
        if FIRST + WIDTH > DIM:
            found = tl.load(
                at, mask=(first_row + rows < end_row)[:, None] & (columns < DIM)[None, :], other=0.0
            )
        else:
            found = tl.load(at, mask=(first_row + rows < end_row)[:, None], other=0.0)
    elif FIRST + WIDTH > DIM:
        found = tl.load(at, mask=(columns < DIM)[None, :], other=0.0)
    else:
        found = tl.load(at)
    if FORMAT != "":
        found = widened(found, FORMAT)
    return found


@triton.jit
def pieces(base, first_row, end_row, row_step, dim_step, EDGE: tl.constexpr, DIM: tl.constexpr,
           WIDE: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
           FORMAT: tl.constexpr = AS_IT_IS):  # fmt: skip
    """Both pieces of (ROWS, DIM)."""
    wide = piece(base, first_row, end_row, row_step, dim_step, EDGE, 0, WIDE, DIM, ROWS, FORMAT)
    rest = wide
    if REST > 0:
        rest = piece(base, first_row, end_row, row_step, dim_step, EDGE, WIDE, REST, DIM, ROWS, FORMAT)
    return wide, rest


@triton.jit
def store_piece(base, value, first_row, end_row, row_step, dim_step, FIRST: tl.constexpr,
                WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, ROWS)
    columns = FIRST + tl.arange(0, WIDTH)
    there = (first_row + rows < end_row)[:, None] & (columns < DIM)[None, :]
    at = base + whole(first_row) * row_step + (rows[:, None] * row_step + columns[None, :] * dim_step)
    tl.store(at, value.to(base.dtype.element_ty), mask=there)


@triton.jit
def store_pieces(base, wide, rest, first_row, end_row, row_step, dim_step, DIM: tl.constexpr,
                 WIDE: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    store_piece(base, wide, first_row, end_row, row_step, dim_step, 0, WIDE, DIM, ROWS)
    if REST > 0:
        store_piece(base, rest, first_row, end_row, row_step, dim_step, WIDE, REST, DIM, ROWS)


@triton.jit
def scores(a_wide, a_rest, b_wide, b_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """a . b^T over both pieces."""
    s = tl.dot(a_wide, tl.trans(b_wide), input_precision=PRECISION)
    if REST > 0:
        s = tl.dot(a_rest, tl.trans(b_rest), s, input_precision=PRECISION)
    return s


@triton.jit
def finite(values):
    """Where they are neither infinite nor NaN."""
    return tl.abs(values.to(tl.float32)) < float("inf")


@triton.jit
def add_product(total, weights, values, seen, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
                FORMAT: tl.constexpr = AS_IT_IS, NARROW: tl.constexpr = False):  # fmt: skip
    """total + weights . values, the weights rounded to the type of the values, or with NARROW as `rounded`.

    Where nothing is seen the weight is 0, and 0 times a NaN or an infinity would still be NaN. CAREFUL lets
    only those rows have it that see such a value. It costs two products and many registers more, so it is a
    launch of its own, in which only those blocks do anything whose plain sums came out infinite or NaN.
    """
    if NARROW:
        w = rounded(weights, FORMAT)
    else:
        w = weights.to(values.dtype)
    if CAREFUL:
        clean = tl.dot(w, tl.where(finite(values), values, 0.0), total, input_precision=PRECISION)
        # 0 and 1 are exact in any type, so that tensor cores may count.
        odd = tl.where(finite(values), 0.0, 1.0).to(values.dtype)
        reached = tl.dot(tl.where(seen, 1.0, 0.0).to(values.dtype), odd, input_precision=PRECISION)
        total = tl.where(reached > 0, total + tl.dot(w, values, input_precision=PRECISION), clean)
    elif NARROW:
        # Hopper's 8-bit products keep 14 bits of a running sum: a tile is summed by itself.
        total = tl.dot(w, values, total, max_num_imprecise_acc=values.shape[0])
    else:
        total = tl.dot(w, values, total, input_precision=PRECISION)
    return total


@triton.jit
def any_odd(wide, rest, REST: tl.constexpr):
    """Is something in the sums of a block infinite or NaN?"""
    odd = tl.max(tl.max(tl.where(finite(wide), 0, 1), 1), 0)
    if REST > 0:
        odd = tl.maximum(odd, tl.max(tl.max(tl.where(finite(rest), 0, 1), 1), 0))
    return odd
