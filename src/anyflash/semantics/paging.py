"""Where the keys of each sequence lie in a KV cache, and where new ones go: lengths and page tables, read and
checked before anything is written.

A cache is pages of `page_size` slots; sequence b has slots 0, 1, .. in the order of its row of the page
table. A dense cache is one page a sequence. Slots from the left padding up to the length hold keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyflash.core.errors import InvalidCall
from anyflash.core.view import View
from anyflash.semantics.addressing import INT32_MAX, Varlen, check_integers, read_bytes, read_starts, view_of
from anyflash.semantics.arrays import as_numpy

Integers = NDArray[np.int64]
_MAX_KEPT, _MAX_KEPT_SIZE = 64, 1 << 16
_read: dict[tuple[Any, ...], Placement] = {}


class Given(NamedTuple):
    """The integer arrays of a call over a cache, after the extents that they must fit.

    rows_q     rows of q: (batch, Tq), or (total,) with `cu_seqlens_q`
    rows_new   rows of the new keys: (batch, Tn), (total,) with `cu_seqlens_k`, or None
    pages      (pages, slots of a page) of the cache
    """

    rows_q: tuple[int, ...]
    rows_new: tuple[int, ...] | None
    pages: tuple[int, ...]
    cu_seqlens_q: View | None = None
    cu_seqlens_k: View | None = None
    seqlens: View | None = None
    block_table: View | None = None
    leftpad: View | None = None
    batch_idx: View | None = None
    rotary_positions: View | None = None


ARGUMENTS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cache.seqlens",
    "cache.block_table",
    "cache.leftpad",
    "cache.batch_idx",
    "rotary_positions",
)


@dataclass(frozen=True, slots=True)
class Placement:
    """What the integers of a call say.

    lengths                  of queries and usable keys, new ones included; `longest_k` is rounded up there
    cu_seqlens_q .. leftpad  copies, as `Operands` has them
    pages, rows              (new keys,) where each new key goes
    positions_k, positions_q  (rows,) the rotary position of every new key and every query
    """

    lengths: Varlen
    longest_k: int
    cu_seqlens_q: View | None
    seqused_k: View
    block_table: View
    leftpad: View | None
    pages: Integers
    rows: Integers
    positions_k: Integers
    positions_q: Integers


def place(given: Given) -> Placement:
    """Read and check. Layers of a model share these arrays, so what was read is kept by the bytes it was read
    from, unless they are many. Raises InvalidCall."""
    views = given[3:]
    if sum(view.size for view in views if view is not None) > _MAX_KEPT_SIZE:
        for name, view in zip(ARGUMENTS, views, strict=True):
            if view is not None:
                check_integers(name, view)
        return _place(given)
    key = (
        *given[:3],
        *[None if v is None else read_bytes(name, v) for name, v in zip(ARGUMENTS, views, strict=True)],
    )
    found = _read.get(key)
    if found is None:
        found = _place(given)
        if len(_read) >= _MAX_KEPT:
            _read.clear()
        _read[key] = found
    return found


def _place(given: Given) -> Placement:
    starts_q, q_lens = _lengths("cu_seqlens_q", given.rows_q, given.cu_seqlens_q, "q")
    batch, page_size = len(q_lens), given.pages[1]
    new_lens = np.zeros(batch, np.int64)
    if given.rows_new is not None:
        _, new_lens = _lengths("cu_seqlens_k", given.rows_new, given.cu_seqlens_k, "k")
        check_new(given, len(new_lens), batch)
    table = _table(given, batch)
    capacity = min(table.shape[1] * page_size, INT32_MAX)
    old = _per_sequence("cache.seqlens", given.seqlens, batch, capacity)
    pad = _per_sequence("cache.leftpad", given.leftpad, batch, 0)
    _refuse("cache.seqlens", old, (old < 0) | (old > capacity), lambda b: f"0 to {capacity}, its slots")
    _refuse("cache.leftpad", pad, (pad < 0) | (pad > old), lambda b: f"0 to {old[b]}, the sequence's length")
    total = old + new_lens
    full = np.flatnonzero(total > capacity)
    if len(full):
        b = int(full[0])
        raise InvalidCall(
            "k",
            f"{new_lens[b]} new keys of sequence {b}",
            f"at most {capacity - old[b]}",
            f"Its cache has {capacity} slots, of which {old[b]} are taken",
        )
    needed = _needed(table.shape[1], pad, total, page_size)
    table = _checked_table(given, table, needed)
    slots = np.repeat(old, new_lens) + _within(new_lens)
    owner = np.repeat(np.arange(batch), new_lens)
    pages, rows = table[owner, slots // page_size].astype(np.int64), slots % page_size
    if len(slots):
        _check_writes(table, needed, pad, total, pages, rows, page_size)
    positions_k, positions_q = _positions(given, old, new_lens, q_lens)
    k_lens = total - pad
    longest_k = int(k_lens.max(initial=0))
    return Placement(
        _said(q_lens, k_lens, longest_k),
        longest_k,
        None if starts_q is None else view_of(starts_q),
        view_of(k_lens.astype(np.int32)),
        view_of(table),
        None if given.leftpad is None else view_of(pad.astype(np.int32)),
        pages,
        rows,
        positions_k,
        positions_q,
    )


def _lengths(
    argument: str, rows: tuple[int, ...], starts: View | None, packed: str
) -> tuple[NDArray[np.int32] | None, Integers]:
    if starts is None:
        return None, np.full(rows[0], rows[1], np.int64)
    read = read_starts(argument, starts, rows[0], packed)
    return read, np.diff(read).astype(np.int64)


def _positions(
    given: Given, old: Integers, new_lens: Integers, q_lens: Integers
) -> tuple[Integers, Integers]:
    """Rotary positions of new keys and of queries: slots, unless they are given."""
    ends = old + new_lens
    slots = [np.repeat(ends - lens, lens) + _within(lens) for lens in (new_lens, q_lens)]
    if given.rotary_positions is None:
        return slots[0], slots[1]
    check_positions_shape(given)
    positions = as_numpy(given.rotary_positions).astype(np.int64).reshape(-1)
    if given.rows_new is None:
        return slots[0], positions[: len(slots[1])]
    short = np.flatnonzero(q_lens > new_lens)
    if len(short):
        b = int(short[0])
        raise too_few_positions(b, int(new_lens[b]), int(q_lens[b]))
    last = np.repeat(np.cumsum(new_lens) - q_lens, q_lens) + _within(q_lens)
    return positions[: len(slots[0])], positions[last]


def check_new(given: Given, sequences: int, batch: int) -> None:
    """Raises InvalidCall unless the new keys are of as many sequences as q, with lengths to go behind."""
    if sequences != batch:
        raise InvalidCall("k", f"{sequences} sequences", f"{batch}, as many as q has")
    if given.seqlens is None:
        expected = f"({batch},) lengths: new keys are written behind them"
        raise InvalidCall("cache.seqlens", "None", expected)


def check_positions_shape(given: Given) -> None:
    if given.rotary_positions is None:
        return
    name, rows = ("q", given.rows_q) if given.rows_new is None else ("k", given.rows_new)
    if given.rotary_positions.shape != tuple(rows):
        raise InvalidCall(
            "rotary_positions", f"shape {given.rotary_positions.shape}", f"{tuple(rows)}, the rows of {name}"
        )


def too_few_positions(sequence: int, new: int, queries: int) -> InvalidCall:
    return InvalidCall(
        "rotary_positions",
        f"{new} for sequence {sequence}, as many as new keys",
        f"at least {queries}, as many as queries: those have the positions of the last keys",
    )


def rounded_up(longest_k: int) -> int:
    """To a power of two, so that the steps of a decoding are mostly one problem."""
    return 1 << (longest_k - 1).bit_length() if longest_k else 0


def _said(q_lens: Integers, k_lens: Integers, longest_k: int) -> Varlen:
    longest_q = int(q_lens.max(initial=0))
    some = q_lens > 0
    ends = k_lens[some]
    firsts = ends - q_lens[some]
    return Varlen(
        len(q_lens),
        longest_q,
        rounded_up(longest_k),
        (int(firsts.min()), int(ends.max()) - 1) if len(ends) else (0, -1),
        (int(q_lens.min(initial=longest_q)), longest_q),
        (int(k_lens.min(initial=longest_k)), longest_k),
    )


def _table(given: Given, batch: int) -> Integers:
    """(batch, pages of a sequence): the page table, or one page a sequence of a dense cache."""
    check_table_shape(given, batch)
    if given.block_table is not None:
        return as_numpy(given.block_table).astype(np.int64)
    return _per_sequence("cache.batch_idx", given.batch_idx, batch, np.arange(batch))[:, None]


def check_table_shape(given: Given, batch: int) -> None:
    """Raises InvalidCall unless the pages of `batch` sequences are told, in one way."""
    num_pages = given.pages[0]
    if given.block_table is not None:
        if given.batch_idx is not None:
            raise InvalidCall(
                "cache.batch_idx", "an array", "None beside a block_table", "Reorder the rows of the table"
            )
        if given.block_table.ndim != 2 or given.block_table.shape[0] != batch:
            raise InvalidCall(
                "cache.block_table",
                f"shape {given.block_table.shape}",
                f"({batch}, pages), a row a sequence of q",
            )
    elif given.batch_idx is None and num_pages != batch:
        raise InvalidCall(
            "cache.k",
            f"{num_pages} sequences",
            f"{batch}, as many as q has",
            "batch_idx says which entries of a larger cache a call is about, block_table which pages",
        )


def _needed(columns: int, pad: Integers, total: Integers, page_size: int) -> NDArray[np.bool_]:
    """Which entries of the table hold a key: (batch, columns)."""
    column = np.arange(columns, dtype=np.int64)
    first, end = pad // page_size, np.where(total > pad, -(-total // page_size), 0)
    return (column >= first[:, None]) & (column < end[:, None])


def _checked_table(given: Given, table: Integers, needed: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The table with entries that nothing needs, which may be anything, made 0."""
    num_pages = given.pages[0]
    wrong = np.argwhere(needed & ((table < 0) | (table >= num_pages)))
    if len(wrong):
        b, column = (int(i) for i in wrong[0])
        raise InvalidCall(
            "cache.block_table" if given.batch_idx is None else "cache.batch_idx",
            f"entry {(b, column) if given.batch_idx is None else b} is {table[b, column]}",
            f"0 to {num_pages - 1}, an entry of the cache",
        )
    return np.where(needed, table, 0).astype(np.int32)


def _check_writes(
    table: NDArray[np.int32],
    needed: NDArray[np.bool_],
    pad: Integers,
    total: Integers,
    pages: Integers,
    rows: Integers,
    page_size: int,
) -> None:
    """No slot that is written may be a key of another sequence, or of the same one a second time."""
    written = np.unique(pages)
    sequence, column = np.nonzero(needed & np.isin(table, written))
    if len(sequence) == len(written):
        return
    row = np.arange(page_size)
    slot = column[:, None] * page_size + row
    holds_key = (slot >= pad[sequence, None]) & (slot < total[sequence, None])
    places = table[sequence, column, None].astype(np.int64) * page_size + row
    held, times = np.unique(places[holds_key], return_counts=True)
    clash = np.intersect1d(held[times > 1], pages * page_size + rows)
    if len(clash):
        page, row = divmod(int(clash[0]), page_size)
        raise InvalidCall(
            "cache.block_table" if table.shape[1] > 1 else "cache.batch_idx",
            f"slot {row} of page {page} would be written, and is a key of {int(times.max())} sequences",
            "slots to be written that belong to one sequence alone",
            "Copy a shared page before it is written, as anyflash.kvcache.PagedCache does",
        )


def _per_sequence(argument: str, view: View | None, batch: int, default: int | Integers = 0) -> Integers:
    if view is None:
        return np.zeros(batch, np.int64) + default
    check_per_sequence(argument, view, batch)
    return as_numpy(view).astype(np.int64)


def check_per_sequence(argument: str, view: View, batch: int) -> None:
    if view.shape != (batch,):
        raise InvalidCall(argument, f"shape {view.shape}", f"({batch},), one entry a sequence of q")


def _refuse(
    argument: str, values: Integers, wrong: NDArray[np.bool_], expected: Callable[[int], str]
) -> None:
    found = np.flatnonzero(wrong)
    if len(found):
        b = int(found[0])
        raise InvalidCall(argument, f"entry {b} is {values[b]}", expected(b))


def _within(lens: Integers) -> Integers:
    """0, 1, .. within each sequence, one after the other."""
    ends = np.cumsum(lens)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lens, lens)
