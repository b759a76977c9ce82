"""Where a plain attention stands and how precisely it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from anyflash.contract.poison import numpy_dtype
from anyflash.core.dtypes import FLOATS8, accumulate, result

ORDERS = 4
"""Ways in which plain attention is summed. One way may be right by luck, most of all where a result has few
elements."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Operations are carried out in `work`, and each result is rounded to `rounds_to`, where given; with
    `tf32`, the factors of matrix products of float32 are cut to that, rounded by even orders, truncated by
    odd ones.

    `order` 0 is the usual way. The others add one term after the other, those above 1 with the keys and the
    head dimension shuffled. Odd ones do so in matrix products too, put the scale on k instead of q,
    exponentiate in base 2 and go backward as a flash attention does, from the output and the logarithm of the
    sum. All are the same attention, rounded differently.

    `weights` is the type in which 8-bit floats take their probabilities, if that is not `rounds_to`. `bits`:
    so many are kept of a sum of 8-bit products, 32 of them at a time.
    """

    work: np.dtype
    rounds_to: np.dtype | None = None
    order: int = 0
    tf32: bool = False
    weights: np.dtype | None = None
    bits: int | None = None

    def weighed(self, e: np.ndarray) -> np.ndarray:
        """exp(s - max s) as the second product takes it: `weights` holds it times 2 ** 8."""
        if self.weights is None:
            return e
        unit = self.work.type(2.0**8)
        return (e * unit).astype(self.weights).astype(self.work) / unit

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x rounded. What leaves the range of float16 keeps its precision: it is the rounding that is
        wanted."""
        if self.rounds_to is None:
            return x
        rounded = x.astype(self.rounds_to).astype(self.work)
        beyond = np.isinf(rounded) & np.isfinite(x)
        if not beyond.any():
            return rounded
        shift = self.work.type(2.0**16)
        return np.where(beyond, (x / shift).astype(self.rounds_to).astype(self.work) * shift, rounded)

    @property
    def odd(self) -> bool:
        return self.order % 2 == 1

    def shuffle(self, count: int) -> np.ndarray:
        """The order in which `count` things are taken."""
        if self.order < 2:
            return np.arange(count)
        return np.random.default_rng(self.order).permutation(count)

    def sum(self, x: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Over some axes, which are dropped: numpy's pairwise sums, or one term after the other."""
        axes = tuple(axes)
        if not self.order or not x.size:
            return x.sum(axis=axes)
        rest = tuple(i for i in range(x.ndim) if i not in axes)
        rows = x.transpose(*rest, *axes).reshape(*(x.shape[i] for i in rest), -1)
        return np.add.accumulate(rows[..., self.shuffle(rows.shape[-1])], axis=-1)[..., -1]

    def factor(self, x: np.ndarray) -> np.ndarray:
        """x as a matrix product takes it."""
        return _tf32(x, nearest=not self.odd) if self.tf32 else x

    def matmul(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """x @ y: the library's product, or one term after the other."""
        if self.bits is not None:
            return self._few_bits(x, y, self.bits)
        x, y = self.factor(x), self.factor(y)
        if not self.odd:
            return x @ y
        total = np.zeros((*x.shape[:-1], y.shape[-1]), self.work)
        for i in range(x.shape[-1]):
            total += x[..., i, None] * y[..., None, i, :]
        return total

    def _few_bits(self, x: np.ndarray, y: np.ndarray, bits: int) -> np.ndarray:
        """x @ y as tensor cores sum it: what lies so far below the greatest of 32 terms and the sum before
        them is cut off."""
        taken = self.shuffle(x.shape[-1])
        total = np.zeros(
            (*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]), self.work
        )
        for first in range(0, len(taken), 32):
            some = taken[first : first + 32]
            terms = x[..., some, None] * y[..., None, some, :]
            terms = np.concatenate((total[..., None, :], terms), -2)
            _, exponent = np.frexp(np.abs(terms).max(-2, keepdims=True))
            unit = np.ldexp(self.work.type(1), exponent - bits)
            total = (np.trunc(terms / unit) * unit).sum(-2)
        return total

    def exp(self, x: np.ndarray) -> np.ndarray:
        return np.exp2(x * self.work.type(np.log2(np.e))) if self.odd else np.exp(x)


def exact(dtype: str) -> Arithmetic:
    """What counts as the truth for results of `dtype`: float64, or the widest float there is for float64."""
    return Arithmetic(np.dtype(np.longdouble if dtype == "float64" else np.float64))


def plain(
    dtype: str, tf32: bool = False, weights: str | None = None, bits: int | None = None
) -> tuple[Arithmetic, ...]:
    """Plain attention in `dtype`, in several orders of its sums: the worst of them sets what a backend may
    err. `tf32`: of one that multiplies float32 so. That of 8-bit floats is in the type of its results, but
    for its probabilities if `weights` is given, and for its products if `bits` is."""
    kind, work = numpy_dtype(result(dtype)), numpy_dtype(accumulate(dtype))
    step = None if kind == work else kind
    narrow = numpy_dtype(weights) if weights and dtype in FLOATS8 else None
    tf32 = tf32 and dtype == "float32"
    bits = bits if dtype in FLOATS8 else None
    return tuple(Arithmetic(work, step, order, tf32, narrow, bits) for order in range(ORDERS))


def accumulator(dtype: str, tf32: bool = False, bits: int | None = None) -> tuple[Arithmetic, ...]:
    """Plain attention in the type of the sums, for results kept in that type (lse, gradients of tables)."""
    made = plain(accumulate(dtype), tf32 and dtype == "float32")
    return tuple(replace(one, bits=bits if dtype in FLOATS8 else None) for one in made)


def _tf32(x: np.ndarray, nearest: bool) -> np.ndarray:
    """float32 with 10 bits of fraction: rounded to nearest even, or truncated."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    kept = np.uint32(0xFFFFE000)
    cut = bits + np.uint32(0xFFF) + ((bits >> 13) & 1) if nearest else bits
    return np.where(np.isfinite(x), (cut & kept).view(np.float32), x)


@dataclass(frozen=True)
class Place:
    """One sequence: which batch entry it is, how long it is, and which of its keys are looked at, in which
    order."""

    batch: int
    heads: int
    q_len: int
    k_len: int
    keys: Sequence[int] | None = None

    @cached_property
    def head(self) -> np.ndarray:
        """(heads, 1, 1)"""
        return np.arange(self.heads)[:, None, None]

    @cached_property
    def row(self) -> np.ndarray:
        """(1, q_len, 1)"""
        return np.arange(self.q_len)[None, :, None]

    @cached_property
    def q(self) -> np.ndarray:
        """Position among the keys, bottom-right: (1, q_len, 1)"""
        return self.row + (self.k_len - self.q_len)

    @cached_property
    def k(self) -> np.ndarray:
        """(1, 1, keys)"""
        return np.asarray(range(self.k_len) if self.keys is None else self.keys, np.int64)[None, None, :]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.heads, self.q_len, self.k.shape[2])


def product(a: np.ndarray, b: np.ndarray, keep: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    """a @ b over the last axis of `a`, (.., m, n) @ (.., n, d), with only the pairs (m, n) in `keep`.

    What is not kept contributes nothing, even NaN or infinity in `b`.
    """
    a = np.where(keep, a, a.dtype.type(0))
    if np.isfinite(b).all():
        return arithmetic.matmul(a, b)
    a, b = arithmetic.factor(a), arithmetic.factor(b)
    terms = np.where(keep[..., None], a[..., None] * b[..., None, :, :], a.dtype.type(0))
    return terms.sum(axis=-2)
