"""Pieces of a score, each in two spellings: as the user writes it, and as plain numpy with its derivative.

The numpy spelling is written by hand and shares nothing with `semantics`: it says what the first must mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from anyflash.contract.arithmetic import Arithmetic, Place
from anyflash.semantics import expr

Arrays = Mapping[str, np.ndarray]
Wrap = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What shapes of tables depend on."""

    batch: int
    heads: int
    q_len: int
    k_len: int


class Term(Protocol):
    """`score` terms write into the user's score function, the others into a keyword argument."""

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tables it reads."""
        ...

    def fill(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Values for one table."""
        ...

    def arguments(self, table: Wrap) -> dict[str, Any]:
        """Keyword arguments of the call; `table(name)` is the user's array."""
        ...

    def forward(self, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic) -> np.ndarray: ...

    def backward(
        self, ds: np.ndarray, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(gradient of s, gradients of the tables), given the s that `forward` got."""
        ...


class _Plain:
    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {}

    def fill(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal(shape)


@dataclass(frozen=True, slots=True)
class Softcap(_Plain):
    """cap * tanh(s / cap)"""

    cap: float

    def arguments(self, table: Wrap) -> dict[str, Any]:
        return {"softcap": self.cap}

    def forward(self, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic) -> np.ndarray:
        cap = s.dtype.type(self.cap)
        return a(cap * a(np.tanh(a(s / cap))))

    def backward(
        self, ds: np.ndarray, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        t = a(np.tanh(a(s / s.dtype.type(self.cap))))
        return a(ds * a(1 - a(t * t))), {}


@dataclass(frozen=True, slots=True)
class Alibi(_Plain):
    """s - slopes[head] * abs(q - k), with one slope a head, or one a batch entry and head."""

    per_batch: bool = False

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {"slopes": (sizes.batch, sizes.heads) if self.per_batch else (sizes.heads,)}

    def fill(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(0.01, 0.5, shape)

    def arguments(self, table: Wrap) -> dict[str, Any]:
        return {"alibi_slopes": table("slopes")}

    def _slopes(self, place: Place, arrays: Arrays) -> np.ndarray:
        slopes = arrays["slopes"]
        return (slopes[place.batch] if self.per_batch else slopes)[:, None, None]

    def forward(self, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic) -> np.ndarray:
        distance = np.abs(place.q - place.k).astype(s.dtype)
        return a(s - a(self._slopes(place, arrays) * distance))

    def backward(
        self, ds: np.ndarray, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        distance = np.abs(place.q - place.k).astype(s.dtype)
        each = a(a.sum(-ds * distance, (1, 2)))
        grad = np.zeros_like(arrays["slopes"])
        if self.per_batch:
            grad[place.batch] = each
        else:
            grad[...] = each
        return ds, {"slopes": grad}


@dataclass(frozen=True, slots=True)
class Biases(_Plain):
    """s + bias for each of several biases; a pattern says which of (batch, heads, q, k) each spans: "bhqk",
    "k", ..

    An axis that is not spanned has extent 1; `fewer_axes` leaves out leading axes of extent 1 altogether.
    """

    patterns: tuple[str, ...]
    fewer_axes: bool = False

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        full = (("b", sizes.batch), ("h", sizes.heads), ("q", sizes.q_len), ("k", sizes.k_len))
        made = {}
        for i, pattern in enumerate(self.patterns):
            shape = tuple(extent if axis in pattern else 1 for axis, extent in full)
            while self.fewer_axes and len(shape) > 1 and shape[0] == 1:
                shape = shape[1:]
            made[f"bias{i}"] = shape
        return made

    def arguments(self, table: Wrap) -> dict[str, Any]:
        biases = [table(f"bias{i}") for i in range(len(self.patterns))]
        return {"bias": biases[0] if len(biases) == 1 else biases}

    def forward(self, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic) -> np.ndarray:
        for i, pattern in enumerate(self.patterns):
            s = a(s + read_part(arrays[f"bias{i}"], pattern, place))
        return s

    def backward(
        self, ds: np.ndarray, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        grads = {}
        for i, pattern in enumerate(self.patterns):
            grad = np.zeros_like(arrays[f"bias{i}"])
            over = tuple(axis for axis, name in enumerate("hqk") if name not in pattern)
            summed = np.expand_dims(a(a.sum(ds, over)), over) if over else ds
            add_part(grad, pattern, place, summed)
            grads[f"bias{i}"] = grad
        return ds, grads


def read_part(array: np.ndarray, pattern: str, place: Place) -> np.ndarray:
    """What one sequence reads of a 4-axis (or shorter) array that spans the axes in `pattern`."""
    part = _rows(array, pattern, place)
    return part[..., place.k[0, 0]] if "k" in pattern else part


def add_part(array: np.ndarray, pattern: str, place: Place, values: np.ndarray) -> None:
    """Add to what `read_part` reads."""
    part = _rows(array, pattern, place)
    if "k" in pattern:
        part[..., place.k[0, 0]] += values
    else:
        part += values


def _rows(array: np.ndarray, pattern: str, place: Place) -> np.ndarray:
    """A view of the (heads or 1, queries or 1, keys or 1) part of one batch entry."""
    four = array.reshape((1,) * (4 - array.ndim) + array.shape)
    part = four[place.batch if "b" in pattern else 0]
    return part[:, : place.q_len] if "q" in pattern else part


@dataclass(frozen=True, slots=True, eq=False)
class Scores(_Plain):
    """A user's score function with its tables, its numpy spelling, and the derivatives of that.

    function   (s, at, tables) -> expression, as the user writes it; tables[name] is an anyflash table
    value      (s, place, arrays) -> s'
    slope      (s, place, arrays) -> d s' / d s
    loads      for each table: (s, place, arrays) -> (index arrays, d s' / d entry)
    extents    for each table: its shape as axis names of "b", "h", "q", "k", or numbers
    """

    name: str
    function: Callable[[expr.Expr, expr.At, Mapping[str, expr.Table]], expr.Expr]
    value: Callable[[np.ndarray, Place, Arrays], np.ndarray]
    slope: Callable[[np.ndarray, Place, Arrays], np.ndarray]
    loads: Mapping[str, Callable[[np.ndarray, Place, Arrays], tuple[tuple[np.ndarray, ...], np.ndarray]]]
    extents: Mapping[str, Sequence[str | int]]

    def __repr__(self) -> str:
        return f"Scores({self.name!r})"

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        named = {"b": sizes.batch, "h": sizes.heads, "q": sizes.q_len, "k": sizes.k_len}
        return {
            name: tuple(e if isinstance(e, int) else named[e] for e in extents)
            for name, extents in self.extents.items()
        }

    def arguments(self, table: Wrap) -> dict[str, Any]:
        tables = {name: expr.Table(table(name), "float") for name in self.extents}
        return {"score": lambda s, at: self.function(s, at, tables)}

    def forward(self, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic) -> np.ndarray:
        return a(self.value(s, place, arrays).astype(s.dtype))

    def backward(
        self, ds: np.ndarray, s: np.ndarray, place: Place, arrays: Arrays, a: Arithmetic
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        grads = {}
        for name, load in self.loads.items():
            index, slope = load(s, place, arrays)
            grad = np.zeros_like(arrays[name])
            where = tuple(np.broadcast_to(i, s.shape) for i in index)
            np.add.at(grad, where, (ds * slope).astype(grad.dtype))
            grads[name] = a(grad)
        return a(ds * self.slope(s, place, arrays).astype(s.dtype)), grads


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _relative(place: Place, reach: int) -> np.ndarray:
    return np.clip(place.k - place.q, -reach, reach) + reach


SCORES = {
    s.name: s
    for s in (
        Scores(
            "head_scaled",
            lambda s, at, t: s * t["gain"][at.head],
            lambda s, place, t: s * t["gain"][:, None, None],
            lambda s, place, t: np.broadcast_to(t["gain"][:, None, None], s.shape),
            {"gain": lambda s, place, t: ((place.head,), s)},
            {"gain": "h"},
        ),
        Scores(
            "softplus",
            lambda s, at, t: expr.log(1 + expr.exp(s)),
            lambda s, place, t: np.log(1 + np.exp(s)),
            lambda s, place, t: _sigmoid(s),
            {},
            {},
        ),
        Scores(
            "relative",
            lambda s, at, t: s + t["rel"][at.head, expr.minimum(expr.maximum(at.k - at.q, -4), 4) + 4],
            lambda s, place, t: s + t["rel"][place.head, _relative(place, 4)],
            lambda s, place, t: np.ones_like(s),
            {"rel": lambda s, place, t: ((place.head, _relative(place, 4)), np.ones_like(s))},
            {"rel": ("h", 9)},
        ),
        Scores(
            "leaky",
            lambda s, at, t: expr.where((s > 0) | (at.k % 2 == 0), s, s / 4),
            lambda s, place, t: np.where((s > 0) | (place.k % 2 == 0), s, s / 4),
            lambda s, place, t: np.where((s > 0) | (place.k % 2 == 0), 1.0, 0.25),
            {},
            {},
        ),
        Scores(
            "two_tables",
            lambda s, at, t: (
                t["cap"][at.head] * expr.tanh(s / t["cap"][at.head]) + t["far"][at.batch, at.k // 3]
            ),
            lambda s, place, t: (
                t["cap"][:, None, None] * np.tanh(s / t["cap"][:, None, None])
                + t["far"][place.batch, place.k // 3]
            ),
            lambda s, place, t: 1 - np.tanh(s / t["cap"][:, None, None]) ** 2,
            {
                "cap": lambda s, place, t: ((place.head,), _softcap_by_cap(s, t["cap"][:, None, None])),
                "far": lambda s, place, t: (
                    (np.full_like(place.k, place.batch), place.k // 3),
                    np.ones_like(s),
                ),
            },
            {"cap": "h", "far": "bk"},
        ),
        Scores(
            "masking",
            lambda s, at, t: expr.where((at.k + at.row) % 3 == 0, float("-inf"), s),
            lambda s, place, t: np.where((place.k + place.row) % 3 == 0, -np.inf, s),
            lambda s, place, t: np.where((place.k + place.row) % 3 == 0, 0.0, 1.0),
            {},
            {},
        ),
        Scores(
            "distance",
            lambda s, at, t: s - abs(at.q - at.k) / (1 + at.head) + minimum_of(at),
            lambda s, place, t: (
                s
                - np.abs(place.q - place.k) / (1 + place.head)
                + np.minimum(place.q_len, place.k_len) * 0.125
            ),
            lambda s, place, t: np.ones_like(s),
            {},
            {},
        ),
    )
}


def minimum_of(at: expr.At) -> expr.Expr:
    """min(q_len, k_len) / 8: the same for every key, so only lse sees it."""
    return expr.minimum(at.q_len, at.k_len) * 0.125


def _softcap_by_cap(s: np.ndarray, cap: np.ndarray) -> np.ndarray:
    t = np.tanh(s / cap)
    return t - (s / cap) * (1 - t * t)
