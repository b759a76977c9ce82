"""A call over a KV cache whose integers lie on a device: what their shapes and dtypes say.

Nothing waits for their values, which may change before a captured graph runs again. So what `paging` checks
of values is not checked here; kernels hold every value inside the arrays instead: a length inside the
capacity, a rotary position inside the tables, and a page outside the cache is neither read nor written.
"""

from __future__ import annotations

from anyflash.core.errors import InvalidCall
from anyflash.core.view import View
from anyflash.semantics.addressing import INT32_MAX, Varlen, check_integer_dtype, check_starts_shape
from anyflash.semantics.paging import (
    ARGUMENTS,
    Given,
    check_new,
    check_per_sequence,
    check_positions_shape,
    check_table_shape,
    rounded_up,
    too_few_positions,
)


def bounds(given: Given) -> Varlen:
    """Bounds of the lengths. Raises InvalidCall for what is surely wrong."""
    for argument, view in zip(ARGUMENTS, given[3:], strict=True):
        if view is not None:
            check_integer_dtype(argument, view)
    batch, longest_q = _rows("cu_seqlens_q", given.rows_q, given.cu_seqlens_q)
    new = 0
    if given.rows_new is not None:
        sequences, new = _rows("cu_seqlens_k", given.rows_new, given.cu_seqlens_k)
        check_new(given, sequences, batch)
    check_table_shape(given, batch)
    per_sequence = (
        ("cache.batch_idx", given.batch_idx),
        ("cache.seqlens", given.seqlens),
        ("cache.leftpad", given.leftpad),
    )
    for argument, view in per_sequence:
        if view is not None:
            check_per_sequence(argument, view, batch)
    capacity = slots(given)
    dense_new = given.rows_new is not None and given.cu_seqlens_k is None
    if dense_new and batch and new > capacity:
        raise InvalidCall("k", f"{new} new keys a sequence", f"at most {capacity}, the slots of its cache")
    check_positions_shape(given)
    if given.rotary_positions is not None and dense_new and given.cu_seqlens_q is None and longest_q > new:
        raise too_few_positions(0, new, longest_q)
    shortest_q = longest_q if given.cu_seqlens_q is None else 0
    return Varlen(
        batch,
        longest_q,
        rounded_up(capacity),
        (-longest_q, capacity - 1),
        (shortest_q, longest_q),
        (0, capacity),
        read=False,
    )


def slots(given: Given) -> int:
    """How many keys a sequence has room for."""
    columns = 1 if given.block_table is None else given.block_table.shape[1]
    return min(columns * given.pages[1], INT32_MAX)


def block_table(given: Given) -> View | None:
    """(batch, pages of a sequence), or None where sequence b has page b."""
    picked = given.batch_idx
    if picked is None:
        return given.block_table
    strides = (*picked.strides, picked.itemsize)
    return View(picked.ptr, (*picked.shape, 1), strides, picked.dtype, picked.device, False, picked.owner)


def _rows(argument: str, rows: tuple[int, ...], starts: View | None) -> tuple[int, int]:
    """(sequences, the most rows that one may have)."""
    if starts is None:
        return rows[0], rows[1]
    check_starts_shape(argument, starts)
    return starts.shape[0] - 1, rows[0]
