"""Attention over a KV cache, and of few queries over many keys: one launch, split over keys.

    s, m, p, l, acc        as in the forward, over the keys of one segment; 8-bit floats are widened first

Rows of a tile are pairs of a query token and a head of one key head's group, r = token * group + member, so
that every key is read once for all heads of a group. A program has BLOCK_M rows of one sequence and, with
SPLIT, one segment of its keys. How keys are cut follows from the sequence's own tokens and keys alone, never
from the batch, the grid or the device: `segments_of`. Tiles in front of the first and behind the last that
the mask leaves are not shared out (TRIM).

Partial sums go to a workspace; the program that arrives last at its block's counter adds them up, in the
order of the segments, whoever it is:

  - each program stores its sums; `meet` orders the stores of all its threads before the atomic of one;
  - that atomic releases and acquires at the scope of the device, so who counts last sees the others' stores;
  - they are read past the first-level cache, which is not coherent;
  - who counts last sets the counter back to 0. Nobody else touches it any more in this launch, and the next
    launch that uses it comes behind this one: `launch_decode` sees to that. So a launch that is recorded in
    a graph can be run again and again.

A sequence with one segment is written at once. Where a mask or a score program may hide keys (HIDES), sums
that came out infinite or NaN are computed again by a walk that lets only those rows have such a value that
see it: in the same program, so that there is one launch whatever the values are.

Registers, in words a thread: acc BLOCK_M * DIM_V / threads, s and p BLOCK_M * BLOCK_N / threads; adding up,
CHUNK more acc. What a configuration may change: BLOCK_M, BLOCK_N (multiples of 16), CHUNK, warps, stages. A
result depends on BLOCK_N, and on what segments are cut by; with BLOCK_M the tensor-core instruction may
change, so that too is chosen by the sequence's own number of rows (`launch_decode`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.combine import add_up, finish, keep, meet
from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.narrow import widened
from anyflash.kernels.triton.pages import gathered_pieces, lengths, within
from anyflash.kernels.triton.sequences import held
from anyflash.kernels.triton.tiles import any_odd
from anyflash.kernels.triton.walk import mend, over_keys, reach


@triton.jit
def block_of(place, blocks, heads, entries, cu_seqlens_q, group, total_q,
             SEARCH: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Block of rows, key head and sequence.

    With SEARCH `blocks` counts those of all sequences: sequence s has the blocks from cu_seqlens_q[s] * group
    // BLOCK_M + s on, and is found by halving.
    """
    block = place % blocks
    head = place // blocks % heads
    entry = place // (blocks * heads)
    if SEARCH:
        low, high = entry * 0, entries + entry * 0
        while high - low > 1:
            middle = (low + high) // 2
            first = _first_block(cu_seqlens_q, middle, group, total_q, BLOCK_M)
            low = tl.where(first <= block, middle, low)
            high = tl.where(first <= block, high, middle)
        block -= _first_block(cu_seqlens_q, low, group, total_q, BLOCK_M)
        # Wrong lengths can leave a block that is nobody's.
        block = tl.where(block < 0, blocks, block)
        entry = low
    return block, head, entry


@triton.jit
def _first_block(cu_seqlens_q, entry, group, total_q, BLOCK_M: tl.constexpr):
    return (held(cu_seqlens_q, entry, total_q) * group // BLOCK_M).to(tl.int32) + entry


@triton.jit
def segments_of(tiles, SEGMENTS: tl.constexpr, LEAST: tl.constexpr):
    """Tiles of a segment, and how many segments there are: at most SEGMENTS, of at least LEAST tiles each."""
    each = tl.maximum(tl.cdiv(tiles, SEGMENTS), LEAST)
    return each, tl.maximum(tl.cdiv(tiles, each), 1)


@triton.jit
def any_odd_rows(odd_rows, wanted, first_row, count, q_start, batch, kv_head, heads, group,
                 PACKED: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Did sums of a block come out infinite or NaN in the kernel that has run before? It had 64 rows of one
    head to a block, `blocks` of each head, numbered as those of kernels/triton/forward.py."""
    odd, blocks = odd_rows
    r = first_row + tl.arange(0, BLOCK_M)
    head = kv_head * group + r % group
    block = r // group // 64
    if PACKED:
        place = whole(head) * blocks + (q_start // 64 + batch) + block
    else:
        place = whole(batch * heads + head) * blocks + (blocks - 1 - block)
    return tl.max(tl.load(odd + place, mask=r < tl.where(wanted, count, 0), other=0), 0) != 0


@triton.jit
def decode(
    q, k, v, out, lse, stats, partial, counters, sinks, cu_seqlens_q, seqused_k, block_table, leftpad_k,
    tables, q_steps, k_steps, v_steps, out_steps, lse_steps, stats_steps, table_steps,
    blocks, parts, entries, heads, group, seqlen_q, seqlen_k, total_q, capacity, num_pages,
    least_rows, most_rows, scale, unit,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr, IDENTITY: tl.constexpr,
    MASK: tl.constexpr, RUNS: tl.constexpr, TRIM: tl.constexpr, HIDES: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, SEARCH: tl.constexpr, USED: tl.constexpr, PADDED: tl.constexpr,
    PAGE: tl.constexpr, GATHER: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTS: tl.constexpr, LEAST: tl.constexpr, CHUNK: tl.constexpr, WAITS: tl.constexpr,
    KEPT: tl.constexpr, HEAD: tl.constexpr,
    FACTOR: tl.constexpr = None, FORMAT_Q: tl.constexpr = "", FORMAT: tl.constexpr = "", odd=None,
    odd_rows=None,
):  # fmt: skip
    """One program for each block of rows, segment (of `parts`), key head and sequence.

    Only sequences with least_rows to most_rows rows (tokens times heads of a group) are answered for: others
    have a launch with other tiles. Of few or some rows only those 64 are that `odd`, if given, (sequences,
    key heads, 2), has a number for. Steps are in elements: (batch, token, head, dim) of q and out, (page,
    slot, head, dim) of k and v, of lse (batch, head, row), of stats (plane, batch, head, row), of the page
    table (batch, page). `odd_rows`: only blocks with rows that are odd are answered for (`any_odd_rows`).
    """
    place = tl.program_id(0)
    # Programs that read the same keys are neighbours.
    segment = place // blocks % parts
    instance = place // (blocks * parts) * blocks + place % blocks
    block, kv_head, batch = block_of(
        instance, blocks, heads // group, entries, cu_seqlens_q, group, total_q, SEARCH, BLOCK_M
    )
    q_start, q_len, k_start, k_len = lengths(
        batch, cu_seqlens_q, seqused_k, leftpad_k, seqlen_q, seqlen_k, total_q, capacity, PACKED, USED, PADDED
    )
    count = q_len * group
    first_row = block * BLOCK_M
    wanted = (first_row < count) & (count >= least_rows) & (count <= most_rows)
    if odd is not None:
        slot = (batch * (heads // group) + kv_head) * 2 + first_row // 64
        broken = tl.load(odd + slot, mask=wanted, other=0)
        if BLOCK_M > 64:
            broken += tl.load(odd + slot + 1, mask=wanted & (count > 64), other=0)
        wanted = wanted & (broken != 0)
    if odd_rows is not None:
        wanted = wanted & any_odd_rows(
            odd_rows, wanted, first_row, count, q_start, batch, kv_head, heads, group, PACKED, BLOCK_M
        )
    if wanted:
        at = (batch, kv_head * group, q_len, k_len)
        tokens = (first_row // group, (tl.minimum(first_row + BLOCK_M, count) - 1) // group)
        first_tile, end_tile = k_len * 0, tl.cdiv(k_len, BLOCK_N)
        if TRIM:
            first_tile, end_tile = reach(end_tile, tokens, at, tables, TILE_CLASS, BLOCK_M, BLOCK_N)
        segments = k_len * 0 + 1
        if SPLIT:
            each, segments = segments_of(end_tile - first_tile, SEGMENTS, LEAST)
            first_tile += segment * each
            end_tile = tl.minimum(first_tile + each, end_tile)
        if segment < segments:
            r = first_row + tl.arange(0, BLOCK_M)
            there = r < count
            token = r // group
            head = kv_head * group + r % group
            entry = whole(batch)
            row, wide_head = token + q_start, whole(head)
            # (BLOCK_M, DIM)
            queries = gathered_pieces(
                q + entry * q_steps[0], row * q_steps[1] + wide_head * q_steps[2], there, q_steps[3],
                DIM, WIDE, REST,
            )  # fmt: skip
            if FORMAT_Q != "":
                queries = (
                    widened(queries[0], FORMAT_Q),
                    widened(queries[1] if REST > 0 else queries[0], FORMAT_Q),
                )
            factor = 1.0
            if FACTOR is not None:
                factor = FACTOR(batch, head, tables)
            logit = tl.full([BLOCK_M], float("-inf"), tl.float32)
            if SINKS:
                found = tl.load(sinks + head, mask=there, other=float("-inf")).to(tl.float32)
                logit = tl.where(segment == 0, found, float("-inf"))
            k += whole(kv_head) * k_steps[2]
            v += whole(kv_head) * v_steps[2]
            table_row = entry * table_steps[0]
            cache = (block_table, table_row, table_steps[1], k_start, num_pages, within(entry, num_pages))
            rows = (token[:, None], head[:, None], there[:, None])
            numbers = (scale, unit)
            acc_wide, acc_rest, m, l = over_keys(
                queries, rows, first_tile, end_tile, tokens, logit, k, v, cache, k_steps, v_steps, tables,
                at, numbers, SCORE, ALLOWED, TILE_CLASS, IDENTITY, MASK, RUNS, SPLIT, False, PAGE, GATHER,
                PRECISION, DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N, STAGES, FORMAT,
            )  # fmt: skip
            places = (
                entry * out_steps[0] + row * out_steps[1] + wide_head * out_steps[2],
                entry * lse_steps[0] + wide_head * lse_steps[1] + row * lse_steps[2],
                entry * stats_steps[1] + wide_head * stats_steps[2] + row * stats_steps[3],
            )
            hidden = segment < 0
            if HIDES:
                hidden = any_odd(acc_wide, acc_rest, REST_V) != 0
            alone = segments == 1
            if SPLIT:
                alone = alone & (hidden == 0)
            if alone:
                finish(
                    out, lse, stats, acc_wide, acc_rest, m, l, places, there, unit, factor, out_steps[3],
                    stats_steps[0], DIM_V, WIDE_V, REST_V,
                )  # fmt: skip
            if SPLIT:
                if not alone:
                    SIZE: tl.constexpr = HEAD + KEPT * (WIDE_V + REST_V)
                    partial += whole(instance) * parts * SIZE
                    own = partial + segment * SIZE
                    keep(own, acc_wide, acc_rest, m, l, there, WIDE_V, REST_V, BLOCK_M, KEPT, HEAD)
                    if HIDES:
                        if hidden:
                            mend(
                                own + HEAD, whole(tl.arange(0, BLOCK_M)) * (WIDE_V + REST_V), 1,
                                tl.full([BLOCK_M], 1.0, tl.float32), queries, rows, first_tile, end_tile,
                                tokens, logit, k, v, cache, k_steps, v_steps, tables, at, numbers,
                                SCORE, ALLOWED, TILE_CLASS, IDENTITY, MASK, RUNS, PAGE, GATHER, PRECISION,
                                DIM, WIDE, REST, DIM_V, BLOCK_M, BLOCK_N, FORMAT, WAITS,
                            )  # fmt: skip
                    meet(WAITS)
                    arrived = tl.atomic_add(counters + instance, 1, sem="acq_rel", scope="gpu")
                    if arrived == segments - 1:
                        tl.store(counters + instance, 0)
                        acc_wide, acc_rest, m, l = add_up(
                            partial, segments, there, unit,
                            SEGMENTS, CHUNK, SIZE, WIDE_V, REST_V, BLOCK_M, KEPT, HEAD,
                        )  # fmt: skip
                        finish(
                            out, lse, stats, acc_wide, acc_rest, m, l, places, there, unit, factor,
                            out_steps[3], stats_steps[0], DIM_V, WIDE_V, REST_V,
                        )  # fmt: skip
            elif HIDES:
                if hidden:
                    mend(
                        out, places[0], out_steps[3], tl.where(l == 0.0, 1.0, l) / factor, queries, rows,
                        first_tile, end_tile, tokens, logit, k, v, cache, k_steps, v_steps, tables, at,
                        numbers, SCORE, ALLOWED, TILE_CLASS, IDENTITY, MASK, RUNS, PAGE, GATHER,
                        PRECISION, DIM, WIDE, REST, DIM_V, BLOCK_M, BLOCK_N, FORMAT, WAITS,
                    )  # fmt: skip
