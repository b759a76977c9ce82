"""Where the rows of each sequence lie: dense arrays, or packed ones with cumulative lengths.

The canonical axes are (batch, tokens, heads, dim) for dense arrays and (tokens, heads, dim) for packed ones.

Lengths in host memory are read and checked before a call runs. Those on a device are not: the host would
have to wait for them, and a captured graph may run again with others. What is known of them is their bounds,
the rows of the arrays; kernels hold every value inside those, so that a wrong one gives a wrong result and no
access outside.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflash.core.device import CPU
from anyflash.core.errors import InvalidCall
from anyflash.core.view import View, contiguous_strides
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Problem

LAYOUTS = {
    "bshd": ("batch", "seqlen", "heads", "head_dim"),
    "bhsd": ("batch", "heads", "seqlen", "head_dim"),
    "thd": ("total", "heads", "head_dim"),
}


def to_canonical(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape in the user's layout made canonical, or the reverse: the permutation is its own inverse."""
    return (shape[0], shape[2], shape[1], shape[3]) if layout == "bhsd" else shape


@dataclass(frozen=True, slots=True)
class Dense:
    """Every sequence has all rows of the array."""

    seqlen_q: int
    seqlen_k: int

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Each position variable's least and greatest value; least > greatest where there is no row."""
        q_len, k_len = self.seqlen_q, self.seqlen_k
        return {
            "row": (0, q_len - 1),
            "q": (k_len - q_len, k_len - 1),
            "k": (0, k_len - 1),
            "q_len": (q_len, q_len),
            "k_len": (k_len, k_len),
        }


@dataclass(frozen=True, slots=True)
class Varlen:
    """What lengths of a packed call say, in numbers: part of the key under which its Problem is kept.

    `longest_*` are the longest sequences; `q` is the range of query positions and `k_len` that of usable
    keys, over all sequences. If they were not `read`, all of these are bounds.
    """

    batch: int
    longest_q: int
    longest_k: int
    q: tuple[int, int]
    q_len: tuple[int, int]
    k_len: tuple[int, int]
    read: bool = True

    @property
    def bounds(self) -> tuple[str, ...]:
        """Variables of whose range only bounds are known."""
        if self.read:
            return ()
        return ("q", "k", "k_len") if self.q_len[0] == self.q_len[1] else ("row", "q", "k", "q_len", "k_len")

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        return {
            "row": (0, self.longest_q - 1),
            "q": self.q,
            "k": (0, self.k_len[1] - 1),
            "q_len": self.q_len,
            "k_len": self.k_len,
        }


Lengths = tuple[Varlen, View, View, View | None]
INT32_MAX = 2**31 - 1
_MAX_KEPT, _MAX_KEPT_SIZE = 256, 4097
_read: dict[tuple[Any, ...], Lengths] = {}


def readable(view: View) -> bool:
    """Does the host read what an array of integers holds? Not on a device: that would wait for it."""
    return view.device.kind == "cpu"


def read_lengths(
    cu_seqlens_q: View | None, cu_seqlens_k: View | None, seqused_k: View | None, total_q: int, total_k: int
) -> Lengths:
    """Check the lengths of a packed call and copy them: (what they say, cu_seqlens_q, cu_seqlens_k,
    seqused_k).

    The returned views are contiguous int32 whatever came in, and a copy, so that what was checked is what
    runs. Layers of a model share their lengths, so what was read is kept by the bytes it was read from.

    On a device only dtypes and shapes are checked, and the views are those that came in.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise InvalidCall(missing, "None", "(sequences + 1,) cumulative lengths of the packed rows")
    if not readable(cu_seqlens_q):
        return _bound_lengths(cu_seqlens_q, cu_seqlens_k, seqused_k, total_q, total_k)
    key = (
        read_bytes("cu_seqlens_q", cu_seqlens_q),
        read_bytes("cu_seqlens_k", cu_seqlens_k),
        None if seqused_k is None else read_bytes("seqused_k", seqused_k),
        total_q,
        total_k,
    )
    found = _read.get(key)
    if found is None:
        found = _read_lengths(cu_seqlens_q, cu_seqlens_k, seqused_k, total_q, total_k)
        if cu_seqlens_q.size <= _MAX_KEPT_SIZE:
            if len(_read) >= _MAX_KEPT:
                _read.clear()
            _read[key] = found
    return found


def read_bytes(argument: str, view: View) -> tuple[str, tuple[int, ...], bytes]:
    """What an array of integers holds, as part of a key. Raises InvalidCall if it holds none or lies on a
    device."""
    check_integers(argument, view)
    strides = contiguous_strides(view.shape, view.itemsize)
    if view.strides != strides or view.ptr is None:
        return view.dtype, view.shape, as_numpy(view).tobytes()
    # As above and several times quicker; every layer of a model asks for the bytes of the same lengths.
    return view.dtype, view.shape, ctypes.string_at(view.ptr, view.size * view.itemsize)


def check_integers(argument: str, view: View) -> None:
    """Raises InvalidCall unless the host can read integers there."""
    check_integer_dtype(argument, view)
    if view.ptr is None or view.device.kind != "cpu":
        raise InvalidCall(
            argument, f"on device {view.device}", "host memory: lengths are read before the call runs"
        )


def check_integer_dtype(argument: str, view: View) -> None:
    if view.dtype not in ("int32", "int64"):
        raise InvalidCall(argument, f"dtype {view.dtype}, shape {view.shape}", "int32 or int64")


def _bound_lengths(
    cu_seqlens_q: View, cu_seqlens_k: View, seqused_k: View | None, total_q: int, total_k: int
) -> Lengths:
    """What shapes alone say."""
    check_integer_dtype("cu_seqlens_q", cu_seqlens_q)
    check_integer_dtype("cu_seqlens_k", cu_seqlens_k)
    check_starts_shape("cu_seqlens_q", cu_seqlens_q)
    check_starts_shape("cu_seqlens_k", cu_seqlens_k)
    batch = cu_seqlens_q.shape[0] - 1
    _check_counts(cu_seqlens_q, cu_seqlens_k)
    if seqused_k is not None:
        check_integer_dtype("seqused_k", seqused_k)
        _check_used_shape(seqused_k, batch)
    said = Varlen(batch, total_q, total_k, (-total_q, total_k - 1), (0, total_q), (0, total_k), read=False)
    return said, cu_seqlens_q, cu_seqlens_k, seqused_k


def _read_lengths(
    cu_seqlens_q: View, cu_seqlens_k: View, seqused_k: View | None, total_q: int, total_k: int
) -> Lengths:
    starts_q = read_starts("cu_seqlens_q", cu_seqlens_q, total_q, "q")
    starts_k = read_starts("cu_seqlens_k", cu_seqlens_k, total_k, "k")
    batch = len(starts_q) - 1
    _check_counts(cu_seqlens_q, cu_seqlens_k)
    q_lens, k_lens = np.diff(starts_q), np.diff(starts_k)
    longest_q, longest_k = int(q_lens.max(initial=0)), int(k_lens.max(initial=0))
    used = None
    if seqused_k is not None:
        k_lens = _used(seqused_k, k_lens)
        used = view_of(k_lens)
    ends = k_lens[q_lens > 0]
    firsts = ends - q_lens[q_lens > 0]
    said = Varlen(
        batch,
        longest_q,
        longest_k,
        (int(firsts.min()), int(ends.max()) - 1) if len(ends) else (0, -1),
        (int(q_lens.min(initial=longest_q)), longest_q),
        (int(k_lens.min(initial=longest_k)), int(k_lens.max(initial=0))),
    )
    return said, view_of(starts_q), view_of(starts_k), used


def read_starts(argument: str, view: View, total: int, packed: str) -> NDArray[np.int32]:
    """Cumulative lengths of the rows of `packed`, checked."""
    check_starts_shape(argument, view)
    starts = as_numpy(view).astype(np.int64)
    if starts[0] != 0:
        raise InvalidCall(argument, f"starts with {starts[0]}", "0 as its first entry")
    falls = np.flatnonzero(starts[1:] < starts[:-1])
    if len(falls):
        i = int(falls[0])
        raise InvalidCall(
            argument,
            f"entry {i + 1} is {starts[i + 1]}, below entry {i} which is {starts[i]}",
            "ascending entries",
            "It holds cumulative lengths, not lengths: numpy.cumsum(lengths) with a 0 in front",
        )
    if starts[-1] > total:
        raise InvalidCall(
            argument,
            f"ends with {starts[-1]}",
            f"at most {total}, the number of rows of {packed}",
        )
    if starts[-1] > INT32_MAX:
        raise InvalidCall(argument, f"ends with {starts[-1]}", f"at most {INT32_MAX}")
    return starts.astype(np.int32)


def check_starts_shape(argument: str, view: View) -> None:
    if view.ndim != 1 or view.shape[0] < 1:
        raise InvalidCall(
            argument, f"shape {view.shape}", "(sequences + 1,)", "It starts with 0 and ends with the total"
        )


def _check_counts(cu_seqlens_q: View, cu_seqlens_k: View) -> None:
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise InvalidCall(
            "cu_seqlens_k",
            f"shape {cu_seqlens_k.shape}",
            f"{cu_seqlens_q.shape} as cu_seqlens_q has",
            "Both hold one entry more than there are sequences",
        )


def _check_used_shape(view: View, batch: int) -> None:
    if view.shape != (batch,):
        raise InvalidCall("seqused_k", f"shape {view.shape}", f"({batch},), one entry a sequence")


def _used(view: View, k_lens: NDArray[np.int32]) -> NDArray[np.int32]:
    _check_used_shape(view, len(k_lens))
    used = as_numpy(view).astype(np.int64)
    wrong = np.flatnonzero((used < 0) | (used > k_lens))
    if len(wrong):
        i = int(wrong[0])
        raise InvalidCall(
            "seqused_k",
            f"entry {i} is {used[i]}",
            f"0 to {k_lens[i]}, the length of that sequence in cu_seqlens_k",
        )
    return used.astype(np.int32)


def view_of(array: NDArray[np.int32]) -> View:
    """A view of a contiguous array."""
    return View(
        array.ctypes.data, array.shape, contiguous_strides(array.shape, 4), "int32", CPU, False, array
    )


def sequence_lengths(
    problem: Problem, operands: Operands
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Queries and usable keys of each sequence, (batch,) both; None if they lie where they are not read.
    `operands` are those that `describe` gave."""
    if problem.addressing == "dense":
        whole = np.ones(problem.batch, np.int64)
        return whole * problem.seqlen_q, whole * problem.seqlen_k
    starts_q, starts_k, used = operands.cu_seqlens_q, operands.cu_seqlens_k, operands.seqused_k
    if problem.addressing == "paged" and used is None:
        return None
    if any(view is not None and not readable(view) for view in (starts_q, starts_k, used)):
        return None
    if used is not None:
        k_lens = as_numpy(used)
    else:
        assert starts_k is not None
        k_lens = np.diff(as_numpy(starts_k))
    if starts_q is None:  # dense queries over a cache
        return np.full(problem.batch, problem.seqlen_q, np.int64), k_lens.astype(np.int64)
    return np.diff(as_numpy(starts_q)).astype(np.int64), k_lens.astype(np.int64)
