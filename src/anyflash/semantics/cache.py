"""One call over a KV cache: from its views to Problem and Operands, and what is written into the cache.

`describe_cache` raises every error of the user's; `write` then only writes, in host memory. On a device that
is a kernel's job, and integers are not read: see `unread`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyflash.core.errors import InvalidCall
from anyflash.core.view import View
from anyflash.semantics import addressing, unread
from anyflash.semantics.addressing import LAYOUTS, to_canonical
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.checks import check_rank, pages_layout, problem_of
from anyflash.semantics.describe import check_devices, named
from anyflash.semantics.operands import Operands
from anyflash.semantics.paging import Given, Placement, place
from anyflash.semantics.problem import Problem, Program
from anyflash.semantics.rotary import Rotary, check_positions, check_rotary, check_some_positions, rotated

_MAX_KEPT = 4096
_problems: dict[tuple[Any, ...], Problem] = {}


class Integers(NamedTuple):
    """The integer arrays of a call; what each says is in `anyflash.attention_kvcache` and `KVCache`."""

    cu_seqlens_q: View | None = None
    cu_seqlens_k: View | None = None
    seqlens: View | None = None
    block_table: View | None = None
    leftpad: View | None = None
    batch_idx: View | None = None
    rotary_positions: View | None = None


class CacheCall(NamedTuple):
    """A described call.

    placement  what its integers say; None where they are not read
    new        keys and values to be appended, in canonical axes; None if there are none
    rotary     how queries and new keys are turned; None if they are not
    integers   as they were given
    """

    problem: Problem
    operands: Operands
    placement: Placement | None
    new: tuple[View, View] | None
    rotary: Rotary | None
    integers: Integers


def describe_cache(
    program: Program | str,
    q: View,
    cache_k: View,
    cache_v: View,
    k: View | None = None,
    v: View | None = None,
    *,
    integers: Integers,
    layout: str = "bshd",
    rotary: Rotary | None = None,
    tables: Sequence[View] = (),
    names: Sequence[str] = (),
    sinks: View | None = None,
) -> CacheCall:
    """What is asked of a cache, and what is to be written into it first.

    q          in `layout`: "bshd", "bhsd", or "thd" with integers.cu_seqlens_q
    cache_*    pages in the layout of q; those of packed q are "bshd"
    k, v       new rows in the layout of q, or packed with integers.cu_seqlens_k; None for none
    the others as in `describe`

    Raises InvalidCall; nothing has been computed or written by then.
    """
    layout_new = _check_layouts(layout, q, cache_k, cache_v, k, v, integers)
    check_devices(
        q,
        **{"cache.k": cache_k, "cache.v": cache_v, "k": k, "v": v, "sinks": sinks},
        **({} if rotary is None else {"rotary cos": rotary.cos, "rotary sin": rotary.sin}),
        **named(tables, names),
        **integers._asdict(),
    )
    rows_new = None if k is None else to_canonical(layout_new, k.shape)[:-2]
    pages = to_canonical(pages_layout(layout), cache_k.shape)[:-2]
    given = Given(to_canonical(layout, q.shape)[:-2], rows_new, pages, *integers)
    placement = place(given) if addressing.readable(q) else None
    said = unread.bounds(given) if placement is None else placement.lengths
    key = (
        program,
        layout,
        layout_new,
        *[view and (view.dtype, view.shape) for view in (q, cache_k, cache_v, k, v, sinks)],
        rotary and (rotary.cos.dtype, rotary.cos.shape, rotary.sin.dtype, rotary.sin.shape),
        said if tables else (said.batch, said.longest_q, said.longest_k),
        integers.leftpad is not None,
        tuple([(table.dtype, table.shape) for table in tables]),
    )
    problem = _problems.get(key)
    if problem is None:
        problem = problem_of(
            Program.parse(program) if isinstance(program, str) else program,
            layout,
            q,
            cache_k,
            cache_v,
            tables,
            names,
            (),
            sinks,
            said,
            True,
            True,
            integers.leftpad is not None,
        )
        _check_new(problem, layout_new, k, v)
        if rotary is not None:
            check_rotary(rotary, problem.head_dim)
        if len(_problems) >= _MAX_KEPT:
            _problems.clear()
        _problems[key] = problem
    if k is not None:
        _check_writable("cache.k", cache_k)
        _check_writable("cache.v", cache_v)
    if rotary is not None and placement is not None:
        check_positions(rotary, "k", placement.positions_k)
        check_positions(rotary, "q", placement.positions_q)
    elif rotary is not None:
        check_some_positions(rotary)
    new = None if k is None or v is None else (_canonical(layout_new, k), _canonical(layout_new, v))
    views = _canonical(layout, q), _canonical(layout, cache_k), _canonical(layout, cache_v)
    if placement is not None:
        operands = Operands(
            *views,
            tuple(tables),
            sinks,
            placement.cu_seqlens_q,
            None,
            placement.seqused_k,
            0,
            placement.block_table,
            placement.leftpad,
            placement.longest_k,
        )
    else:
        known = k is None and integers.leftpad is None
        operands = Operands(
            *views,
            tuple(tables),
            sinks,
            integers.cu_seqlens_q,
            None,
            integers.seqlens if known else None,
            0,
            unread.block_table(given),
            integers.leftpad,
            said.k_len[1],
        )
    return CacheCall(problem, operands, placement, new, rotary, integers)


def write(call: CacheCall, turned: View | None) -> Operands:
    """Write what is new into the cache, in host memory, and the queries to `turned`, which is C-contiguous in
    canonical axes; None if they are not turned. Returns the operands of the attention that follows."""
    append(call)
    if turned is None:
        return call.operands
    rotate_queries(call, turned)
    return replace(call.operands, q=turned)


def append(call: CacheCall) -> None:
    """Write the new keys, turned if that is asked for, and values into the cache."""
    if call.new is None:
        return
    assert call.placement is not None
    pages, rows = call.placement.pages, call.placement.rows
    for new, cache, turn in zip(call.new, (call.operands.k, call.operands.v), (True, False), strict=True):
        source, target = _flat(new)[: len(pages)], as_numpy(cache)
        if turn and call.rotary is not None:
            for some, turned in _turned(call.rotary, source, call.placement.positions_k):
                target[pages[some], rows[some]] = turned
        else:
            target[pages, rows] = source


def rotate_queries(call: CacheCall, out: View) -> None:
    """Write turned queries to `out`, which is C-contiguous in canonical axes."""
    assert call.rotary is not None
    assert call.placement is not None
    positions = call.placement.positions_q
    source, target = _flat(call.operands.q), as_numpy(out).reshape(-1, *out.shape[-2:])
    target[len(positions) :] = source[len(positions) :]
    for some, turned in _turned(call.rotary, source[: len(positions)], positions):
        target[some] = turned


def _turned(rotary: Rotary, rows: NDArray[Any], positions: NDArray[np.int64]) -> Any:
    return rotated(rows, positions, as_numpy(rotary.cos), as_numpy(rotary.sin), rotary.interleaved)


def _flat(view: View) -> NDArray[Any]:
    """(rows, heads, dim)"""
    return as_numpy(view).reshape(-1, *view.shape[-2:])


def _canonical(layout: str, view: View) -> View:
    return view.permute((0, 2, 1, 3)) if layout == "bhsd" else view


def _check_layouts(
    layout: str, q: View, cache_k: View, cache_v: View, k: View | None, v: View | None, integers: Integers
) -> str:
    """The layout of new keys and values."""
    packed = integers.cu_seqlens_q is not None
    if packed and k is not None and integers.cu_seqlens_k is None:
        raise InvalidCall("cu_seqlens_k", "None", "cumulative lengths of the new keys beside packed queries")
    if layout not in (("thd",) if packed else ("bshd", "bhsd")):
        raise InvalidCall(
            "layout",
            repr(layout),
            "'thd', because of cu_seqlens_q" if packed else "'bshd' or 'bhsd'",
            "Packed queries come with cu_seqlens_q" if layout == "thd" else None,
        )
    check_rank("q", q.shape, layout)
    for argument, view in (("cache.k", cache_k), ("cache.v", cache_v)):
        check_rank(argument, view.shape, pages_layout(layout))
        if 0 in view.shape[1:3]:
            raise InvalidCall(argument, f"shape {view.shape}", "at least one slot a page, and one head")
    layout_new = "thd" if integers.cu_seqlens_k is not None else layout
    for argument, view in (("k", k), ("v", v)):
        if view is not None:
            check_rank(argument, view.shape, layout_new)
    return layout_new


def _check_new(problem: Problem, layout: str, k: View | None, v: View | None) -> None:
    if k is None or v is None:
        return
    for argument, view, dim in (("k", k, problem.head_dim), ("v", v, problem.head_dim_v)):
        if view.dtype != problem.dtype_kv:
            raise InvalidCall(argument, f"dtype {view.dtype}", f"{problem.dtype_kv}, the dtype of the cache")
        found, expected = to_canonical(layout, view.shape)[-2:], (problem.heads_kv, dim)
        if found != expected:
            raise InvalidCall(
                argument,
                f"{found[0]} heads and head_dim {found[1]} in shape {view.shape}",
                f"{expected[0]} and {expected[1]}, those of the cache",
                f"Is the layout {layout!r}, axes ({', '.join(LAYOUTS[layout])})?",
            )
    if to_canonical(layout, k.shape)[:-2] != to_canonical(layout, v.shape)[:-2]:
        raise InvalidCall("v", f"shape {v.shape}", f"the rows of k with shape {k.shape}")


def _check_writable(argument: str, view: View) -> None:
    if not view.writable:
        raise InvalidCall(argument, f"shape {view.shape}, read-only", "a writable array, to append to")
    if any(extent > 1 and not stride for extent, stride in zip(view.shape, view.strides, strict=True)):
        raise InvalidCall(
            argument,
            f"shape {view.shape}, several elements in one place",
            "memory of its own for each element, to append to",
        )
