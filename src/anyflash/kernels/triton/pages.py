"""Where the keys of a sequence lie, and tiles of them.

Key j of sequence b is slot j + leftpad[b] of the sequence, and slot s is row s % PAGE of page
block_table[b, s // PAGE]. A tile's rows are found in one of three ways, chosen before the launch:

    PAGE 0           keys follow each other in memory: the tile starts at a corner
    PAGE, no GATHER  a tile lies in one page (PAGE is a multiple of its rows, no leftpad): one look-up
    PAGE, GATHER     each row by a look-up of its own: any page size, any leftpad

Page tables may hold anything: only entries of slots that hold a key of the sequence are read, and what is
read is held inside the cache. Places are in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.sequences import held, span
from anyflash.kernels.triton.tiles import pieces


@triton.jit
def within(page, num_pages):
    """A page's number, whatever the table holds: there is no page outside the cache."""
    return tl.maximum(tl.minimum(page.to(tl.int64), num_pages - 1), 0)


@triton.jit
def lengths(batch, cu_seqlens_q, seqused_k, leftpad_k, seqlen_q, seqlen_k, total_q, capacity,
            PACKED: tl.constexpr, USED: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """First row and number of rows, slots in front of the keys and number of keys; firsts in 64 bits.

    Nobody has looked at these numbers: they are held inside the arrays, keys inside `capacity` slots.
    """
    q_start = tl.full([], 0, tl.int64)
    q_len = tl.full([], 0, tl.int32) + seqlen_q
    if PACKED:
        q_start, q_len = span(cu_seqlens_q, batch, total_q)
        q_len = tl.minimum(q_len, seqlen_q)
    k_start = tl.full([], 0, tl.int64)
    k_len = tl.full([], 0, tl.int64) + seqlen_k
    if USED:
        if PADDED:
            k_start = held(leftpad_k, batch, capacity)
        k_len = held(seqused_k, batch, tl.minimum(capacity - k_start, k_len))
    return q_start, q_len, k_start, k_len.to(tl.int32)


@triton.jit
def gathered(base, places, there, dim_step, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """(rows, WIDTH): columns from FIRST of the rows at `places`; 0 past DIM and where no row is."""
    columns = FIRST + tl.arange(0, WIDTH)
    at = base + (places[:, None] + columns[None, :] * dim_step)
    if FIRST + WIDTH > DIM:
        found = tl.load(at, mask=there[:, None] & (columns < DIM)[None, :], other=0.0)
    else:
        found = tl.load(at, mask=there[:, None], other=0.0)
    return found


@triton.jit
def gathered_pieces(base, places, there, dim_step, DIM: tl.constexpr, WIDE: tl.constexpr,
                    REST: tl.constexpr):  # fmt: skip
    """Both pieces of (rows, DIM)."""
    wide = gathered(base, places, there, dim_step, 0, WIDE, DIM)
    rest = wide
    if REST > 0:
        rest = gathered(base, places, there, dim_step, WIDE, REST, DIM)
    return wide, rest


@triton.jit
def scattered_piece(base, value, places, there, dim_step, FIRST: tl.constexpr, WIDTH: tl.constexpr,
                    DIM: tl.constexpr):  # fmt: skip
    columns = FIRST + tl.arange(0, WIDTH)
    at = base + (places[:, None] + columns[None, :] * dim_step)
    tl.store(at, value.to(base.dtype.element_ty), mask=there[:, None] & (columns < DIM)[None, :])


@triton.jit
def scattered(base, wide, rest, places, there, dim_step, DIM: tl.constexpr, WIDE: tl.constexpr,
              REST: tl.constexpr):  # fmt: skip
    """Store both pieces of (rows, DIM)."""
    scattered_piece(base, wide, places, there, dim_step, 0, WIDE, DIM)
    if REST > 0:
        scattered_piece(base, rest, places, there, dim_step, WIDE, REST, DIM)


@triton.jit
def spot(first_k, k_len, cache, PAGE: tl.constexpr, GATHER: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the tile from key first_k on: pages, slots within them, and which rows hold a key.

    `cache` is (block_table, its row of this sequence, step of entries, k_start, num_pages, page of a dense
    cache). Without GATHER pages and slots are of the tile's first row.
    """
    block_table, table_row, table_step, k_start, num_pages, own_page = cache
    keys = first_k + tl.arange(0, BLOCK_N)
    there = keys < k_len
    if PAGE == 0:
        page = own_page
        slot = k_start + first_k
    elif GATHER:
        slots = (k_start + keys).to(tl.int32)
        entry = block_table + (table_row + whole(slots // PAGE) * table_step)
        page = within(tl.load(entry, mask=there, other=0), num_pages)
        slot = whole(slots % PAGE)
    else:
        page = within(tl.load(block_table + (table_row + whole(first_k // PAGE) * table_step)), num_pages)
        slot = whole(first_k % PAGE)
    return page, slot, there


@triton.jit
def keys_at(base, page, slot, there, rows, steps, EDGE: tl.constexpr, GATHER: tl.constexpr,
            DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Both pieces of (BLOCK_N, DIM): the tile at a `spot`, of which `rows` hold a key; steps are (page, slot,
    head, dim)."""
    if GATHER:
        wide, rest = gathered_pieces(
            base, page * steps[0] + slot * steps[1], there, steps[3], DIM, WIDE, REST
        )
    else:
        wide, rest = pieces(
            base + page * steps[0] + slot * steps[1], 0, rows, steps[1], steps[3], EDGE, DIM, WIDE, REST,
            BLOCK_N,
        )  # fmt: skip
    return wide, rest
