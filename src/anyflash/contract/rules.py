"""Masks, each in two spellings: as the user writes it, and as a numpy formula over positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from anyflash.contract.arithmetic import Place
from anyflash.contract.terms import Arrays, Sizes, Wrap, read_part
from anyflash.semantics import expr


class Rule(Protocol):
    """One mask. Tables are filled with ints or bools."""

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]: ...

    def fill(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray: ...

    def arguments(self, table: Wrap) -> dict[str, Any]: ...

    def allowed(self, place: Place, arrays: Arrays) -> np.ndarray:
        """Broadcastable to (heads, q_len, keys)."""
        ...


class _Fixed:
    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return {}

    def fill(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Causal(_Fixed):
    """k <= q"""

    def arguments(self, table: Wrap) -> dict[str, Any]:
        return {"causal": True}

    def allowed(self, place: Place, arrays: Arrays) -> np.ndarray:
        return place.k <= place.q


@dataclass(frozen=True, slots=True)
class Window(_Fixed):
    """q - left <= k <= q + right, None unbounded"""

    left: int | None
    right: int | None

    def arguments(self, table: Wrap) -> dict[str, Any]:
        return {"window": (self.left, self.right)}

    def allowed(self, place: Place, arrays: Arrays) -> np.ndarray:
        ahead = place.k - place.q
        ok = np.ones_like(ahead, bool)
        if self.left is not None:
            ok &= ahead >= -self.left
        if self.right is not None:
            ok &= ahead <= self.right
        return ok


@dataclass(frozen=True, slots=True)
class Dense:
    """A boolean array that spans the axes in `pattern`; `density` of it is True."""

    pattern: str = "bhqk"
    density: float = 0.5

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        full = (("b", sizes.batch), ("h", sizes.heads), ("q", sizes.q_len), ("k", sizes.k_len))
        return {"dense": tuple(extent if axis in self.pattern else 1 for axis, extent in full)}

    def fill(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        return rng.random(shape) < self.density

    def arguments(self, table: Wrap) -> dict[str, Any]:
        return {"mask": table("dense")}

    def allowed(self, place: Place, arrays: Arrays) -> np.ndarray:
        return read_part(arrays["dense"], self.pattern, place)


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """A user's mask function with its integer tables, and its numpy spelling.

    function   (at, tables) -> bool expression
    value      (place, arrays) -> bool array
    extents    shapes of the tables as axis names, or numbers
    values     (name, shape, rng) -> the table's entries
    """

    name: str
    function: Callable[[expr.At, Mapping[str, expr.Table]], expr.Expr]
    value: Callable[[Place, Arrays], np.ndarray]
    extents: Mapping[str, Sequence[str | int]] = field(default_factory=dict)
    values: Callable[[str, tuple[int, ...], np.random.Generator], np.ndarray] | None = None

    def __repr__(self) -> str:
        return f"Masks({self.name!r})"

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        named = {"b": sizes.batch, "h": sizes.heads, "q": sizes.q_len, "k": sizes.k_len}
        return {
            name: tuple(e if isinstance(e, int) else named[e] for e in extents)
            for name, extents in self.extents.items()
        }

    def fill(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        if self.values is None:
            raise KeyError(name)
        return self.values(name, shape, rng)

    def arguments(self, table: Wrap) -> dict[str, Any]:
        tables = {name: expr.Table(table(name), "int") for name in self.extents}
        return {"mask": lambda at: self.function(at, tables)}

    def allowed(self, place: Place, arrays: Arrays) -> np.ndarray:
        return self.value(place, arrays)


def _documents(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Ascending document numbers along the last axis."""
    return np.cumsum(rng.random(shape) < 0.15, axis=-1)


def _reach(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 9, shape)


def _clamped(table: np.ndarray, index: np.ndarray) -> np.ndarray:
    if not table.shape[-1]:
        return np.zeros(index.shape, table.dtype)
    return table[..., np.clip(index, 0, table.shape[-1] - 1)]


MASKS = {
    m.name: m
    for m in (
        Masks("none", lambda at, t: at.k < 0, lambda place, t: place.k < 0),
        Masks(
            "prefix",
            lambda at, t: (at.k < 5) | (at.k <= at.q),
            lambda place, t: (place.k < 5) | (place.k <= place.q),
        ),
        Masks(
            "dilated",
            lambda at, t: (at.q - at.k) % 3 == 0,
            lambda place, t: np.mod(place.q - place.k, 3) == 0,
        ),
        Masks(
            "blocks",
            lambda at, t: at.row // 16 == at.k // 16,
            lambda place, t: place.row // 16 == place.k // 16,
        ),
        Masks(
            "by_head",
            lambda at, t: (at.k <= at.q) | (at.head % 2 == 1),
            lambda place, t: (place.k <= place.q) | (place.head % 2 == 1),
        ),
        Masks(
            "outside",
            lambda at, t: ~((at.q - 3 < at.k) & (at.k < at.q + 3)),
            lambda place, t: np.abs(place.q - place.k) >= 3,
        ),
        Masks(
            "documents",
            lambda at, t: t["document"][expr.maximum(at.q, 0)] == t["document"][at.k],
            lambda place, t: _clamped(t["document"], place.q) == t["document"][place.k],
            {"document": "k"},
            _documents,
        ),
        Masks(
            "documents_by_batch",
            lambda at, t: (
                (t["document"][at.batch, expr.maximum(at.q, 0)] == t["document"][at.batch, at.k])
                & (at.k <= at.q)
            ),
            lambda place, t: (
                (_clamped(t["document"][place.batch], place.q) == t["document"][place.batch][place.k])
                & (place.k <= place.q)
            ),
            {"document": "bk"},
            _documents,
        ),
        Masks(
            "reach_by_batch",
            lambda at, t: (at.q - t["left"][at.batch] <= at.k) & (at.k <= at.q + t["right"][at.batch]),
            lambda place, t: (
                (place.q - t["left"][place.batch] <= place.k) & (place.k <= place.q + t["right"][place.batch])
            ),
            {"left": "b", "right": "b"},
            _reach,
        ),
        Masks(
            "sinks_and_window",
            lambda at, t: ((at.k < 2) | (at.q - at.k < 7)) & (at.k <= at.q),
            lambda place, t: ((place.k < 2) | (place.q - place.k < 7)) & (place.k <= place.q),
        ),
        Masks("late_half", lambda at, t: 2 * at.k >= at.k_len, lambda place, t: 2 * place.k >= place.k_len),
        Masks("few_rows", lambda at, t: at.row % 5 == 1, lambda place, t: place.row % 5 == 1),
    )
}
