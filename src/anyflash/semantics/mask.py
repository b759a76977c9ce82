"""Which keys a query may see. `anyflash.masks` is this module's public face.

A mask is a function of where a score stands that gives a condition; `&`, `|` and `~` combine masks with each
other, with functions `f(at) -> condition` and with boolean arrays. It is passed as `mask=` to the attention
calls.

    masks.causal() & masks.window(left=128)
    masks.causal() | masks.prefix(16)
    masks.documents(ids) & (lambda at: at.head < 4)

Query positions are bottom-right aligned: query row i of n sits at key i + k_len - n, so the last query sits
at the last key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from anyflash.core.dtypes import ITEMSIZE, kind
from anyflash.core.errors import InvalidCall
from anyflash.semantics.evaluate import evaluate
from anyflash.semantics.expr import At, Expr, Kind, Table, const, var
from anyflash.semantics.text import bind

__all__ = ["Mask", "as_mask", "causal", "dense", "documents", "prefix", "tree", "upper_left", "window"]

Build = Callable[[At], Expr]
_AXES = ("batch", "head", "row", "k")
_TIGHT, _AND, _OR = 3, 2, 1


class _Needs(NamedTuple):
    """The shape that an array of a mask must broadcast to, as axis names; reported under `argument`."""

    argument: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]


class Mask:
    """A condition on (batch, head, query, key), true where the query may see the key.

    Made by the functions of `anyflash.masks`, or from any function of `at` by `Mask(function)`.
    """

    __slots__ = ("_build", "_level", "_needs", "_text")

    def __init__(
        self,
        build: Build,
        text: str | None = None,
        needs: tuple[_Needs, ...] = (),
        level: int = _TIGHT,
    ) -> None:
        self._build = build
        # Not `text or`: inside torch.compile torch 2.11 cannot branch on a formatted text.
        self._text = f"Mask({getattr(build, '__name__', repr(build))})" if text is None else text
        self._needs = needs
        self._level = level

    def __call__(self, at: At) -> Expr:
        """The condition at `at`, whose arrays are still tables."""
        return _condition(self._build(at))

    def __and__(self, other: Any) -> Mask:
        return self._join(as_mask(other), "&", _AND, lambda a, b: a & b)

    def __rand__(self, other: Any) -> Mask:
        return as_mask(other) & self

    def __or__(self, other: Any) -> Mask:
        return self._join(as_mask(other), "|", _OR, lambda a, b: a | b)

    def __ror__(self, other: Any) -> Mask:
        return as_mask(other) | self

    def __invert__(self) -> Mask:
        return Mask(lambda at: ~self(at), f"~{self._within(_TIGHT)}", self._needs)

    # numpy arrays leave `array & mask` to the mask instead of trying it element by element.
    __array_ufunc__ = None

    def __repr__(self) -> str:
        return self._text

    def _join(self, other: Mask, symbol: str, level: int, combine: Callable[[Expr, Expr], Expr]) -> Mask:
        text = f"{self._within(level)} {symbol} {other._within(level)}"
        return Mask(lambda at: combine(self(at), other(at)), text, self._needs + other._needs, level)

    def _within(self, level: int) -> str:
        return self._text if self._level >= level else f"({self._text})"

    def check(self, batch: int, heads: int, q_len: int | None, k_len: int | None) -> None:
        """Raise InvalidCall unless every array in the mask fits these extents; None means not known."""
        extents = {"batch": batch, "head": heads, "row": q_len, "k": k_len}
        for argument, shape, axes in self._needs:
            wanted = tuple(extents[axis] for axis in axes)
            fits = all(n in (1, w) or w is None for n, w in zip(shape, wanted, strict=True))
            if not fits:
                names = ", ".join(axes).replace("head", "heads").replace("row", "q")
                shown = ", ".join("any" if w is None else str(w) for w in wanted)
                expected = f"a shape that broadcasts to ({names}) = ({shown})"
                raise InvalidCall(argument, f"shape {shape}", expected)

    def allowed(self, q_len: int, k_len: int, batch: int = 1, heads: int = 1) -> NDArray[np.bool_]:
        """The mask written out: (batch, heads, q_len, k_len) bool. For looking at small cases.

        >>> causal().allowed(2, 3)[0, 0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 1]]
        """
        self.check(batch, heads, q_len, k_len)
        (expr,), tables = bind([self(At())])
        assert expr is not None
        rows = np.arange(q_len)[:, None]
        env = {
            "batch": np.arange(batch)[:, None, None, None],
            "head": np.arange(heads)[:, None, None],
            "row": rows,
            "q": rows + k_len - q_len,
            "k": np.arange(k_len),
            "q_len": q_len,
            "k_len": k_len,
        }
        values = evaluate(expr, env, [np.asarray(t.array) for t in tables])
        return np.broadcast_to(values, (batch, heads, q_len, k_len))

    def draw(self, q_len: int, k_len: int, batch: int = 0, head: int = 0) -> str:
        """One (batch, head) as lines of 0 and 1: a line a query, a column a key.

        >>> print(causal().draw(2, 3))
        1 1 0
        1 1 1
        """
        square = self.allowed(q_len, k_len, batch + 1, head + 1)[batch, head]
        return "\n".join(" ".join("1" if seen else "0" for seen in row) for row in square)


def as_mask(value: Any) -> Mask:
    """A Mask from a Mask, a function of `at`, or a boolean array. Raises InvalidCall for anything else."""
    if isinstance(value, Mask):
        return value
    if isinstance(value, Expr):
        raise InvalidCall("mask", "an expression", "a function that makes one", "Write lambda at: ...")
    return Mask(cast(Build, value)) if callable(value) else dense(value)


def causal() -> Mask:
    """Keys up to the query's own position: k <= q. The last query sees every key.

    >>> print(causal().draw(3, 5))
    1 1 1 0 0
    1 1 1 1 0
    1 1 1 1 1

    With more queries than keys the first ones see nothing:

    >>> print(causal().draw(4, 2))
    0 0
    0 0
    1 0
    1 1
    """
    return Mask(lambda at: at.k <= at.q, "causal()")


def upper_left() -> Mask:
    """Keys up to the query's row, both counted from the first: k <= row. torch calls this causal; with as
    many queries as keys it is `causal()`.

    >>> print(upper_left().draw(2, 4))
    1 0 0 0
    1 1 0 0
    """
    return Mask(lambda at: at.k <= at.row, "upper_left()")


def window(left: int | None = None, right: int | None = None) -> Mask:
    """Keys q - left to q + right, both included; None leaves a side without bound.

    >>> print(window(1, 0).draw(4, 4))
    1 0 0 0
    1 1 0 0
    0 1 1 0
    0 0 1 1
    >>> print(window(right=1).draw(3, 3))
    1 1 0
    1 1 1
    1 1 1

    Raises InvalidCall if a side is negative.
    """
    for side, value in (("left", left), ("right", right)):
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__") or value < 0):
            expected = "None or a whole number of at least 0"
            raise InvalidCall(f"window {side}", repr(value), expected, "None is unbounded, not -1")

    def build(at: At) -> Expr:
        after = const(True) if left is None else at.q - left <= at.k
        before = const(True) if right is None else at.k <= at.q + right
        if left is None or right is None:
            return before if left is None else after
        return after & before

    return Mask(build, f"window({left}, {right})")


def prefix(n: Any) -> Mask:
    """The first `n` keys, for every query: a number, or an integer array with one number a batch entry.

    Combined with `causal` it makes a prefix language model:

    >>> print((prefix(2) | causal()).draw(4, 4))
    1 1 0 0
    1 1 0 0
    1 1 1 0
    1 1 1 1

    Raises InvalidCall if `n` is neither.
    """
    if hasattr(n, "__index__") and not getattr(n, "ndim", 0):
        return Mask(lambda at: at.k < int(n), f"prefix({int(n)})")
    lengths = _array("prefix", n, "int", (("batch",),))
    return Mask(lambda at: at.k < _read(lengths), f"prefix({lengths})", (lengths.needs,))


def documents(ids_q: Any, ids_k: Any = None) -> Mask:
    """Pairs whose query and key belong to the same document. Integer arrays (tokens,) or (batch, tokens).

    A negative id marks padding, which belongs to no document: it sees nothing and nothing sees it. With one
    array, it numbers the keys, and a query has the id of the key at its position. With two, `ids_q` numbers
    query rows and `ids_k` keys. Ids that ascend along the tokens let whole blocks be skipped.

    >>> import numpy as np
    >>> print((documents(np.array([4, 4, 7, 7, -1])) & causal()).draw(5, 5))
    1 0 0 0 0
    1 1 0 0 0
    0 0 1 0 0
    0 0 1 1 0
    0 0 0 0 0

    Raises InvalidCall if an array is not of integers or has another rank.
    """
    ranks = (("token",), ("batch", "token"))
    keys = _array("documents", ids_q if ids_k is None else ids_k, "int", ranks, token="k")
    queries, place, needs = keys, "q", (keys.needs,)
    if ids_k is not None:
        queries, place = _array("documents", ids_q, "int", ranks, token="row"), "row"
        needs = (queries.needs, keys.needs)

    def build(at: At) -> Expr:
        document = _read(queries, place)
        return (document == _read(keys, "k")) & (document >= 0)

    text = f"documents({keys})" if ids_k is None else f"documents({queries}, {keys})"
    return Mask(build, text, needs)


def tree(ancestors: Any) -> Mask:
    """Speculated tokens that form a tree: the queries are its nodes, and so are the last keys of the call.

    `ancestors` is boolean, (queries, queries) or (batch, queries, queries): true where node [row] follows
    from node [column], itself included. Every key before the tree is seen by all nodes.

    >>> import numpy as np
    >>> two_branches = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    >>> print(tree(two_branches).draw(3, 5))
    1 1 1 0 0
    1 1 1 1 0
    1 1 1 0 1

    Raises InvalidCall if it is not boolean or has another rank.
    """
    ranks = (("row", "row"), ("batch", "row", "row"))
    array = _array("tree", ancestors, "bool", ranks)

    def build(at: At) -> Expr:
        first = at.k_len - at.q_len
        index = [at.row, at.k - first]
        place = [at.batch] if "batch" in array.axes else []
        place += [i for i, extent in zip(index, array.needs.shape[-2:], strict=True) if extent != 1]
        return (at.k < first) | array.table[tuple(place)]

    return Mask(build, f"tree({array})", (array.needs,))


def dense(array: Any) -> Mask:
    """A boolean array, true where a query may see a key, broadcastable to (batch, heads, q, k).

    >>> import numpy as np
    >>> print(dense(np.array([True, False, True])).draw(2, 3))
    1 0 1
    1 0 1

    Raises InvalidCall if it is not boolean or has more than four axes. It is read where it lies; blocks of it
    are not skipped, unlike those of the other masks.
    """
    values = _array("mask", array, "bool", tuple(_AXES[n:] for n in range(5)))
    return Mask(lambda at: _read(values), f"dense({values})", (values.needs,))


def _condition(result: Any) -> Expr:
    if isinstance(result, bool):
        return const(result)
    if isinstance(result, Expr) and result.kind == "bool":
        return result
    found = f"a number ({result.kind})" if isinstance(result, Expr) else f"a {type(result).__name__}"
    raise InvalidCall("mask", f"the function returned {found}", "a condition, such as at.k <= at.q")


class _Array(NamedTuple):
    """An array of a mask without its axes of extent 1, which are stretched; `axes` names the others."""

    table: Table
    axes: tuple[str, ...]
    needs: _Needs

    def __str__(self) -> str:
        return f"<{self.table.kind} {self.needs.shape}>"


def _array(
    argument: str, array: Any, wanted: Kind, ranks: tuple[tuple[str, ...], ...], token: str = ""
) -> _Array:
    """`ranks` are the axes it may have; `token` says which axis of the call "token" stands for."""
    array = array if hasattr(array, "shape") and hasattr(array, "dtype") else np.asarray(array)
    dtype = str(array.dtype).rpartition(".")[2].rstrip("_")
    shape = tuple(int(n) for n in array.shape)
    axes = next((axes for axes in ranks if len(axes) == len(shape)), None)
    if dtype not in ITEMSIZE or kind(dtype) != wanted or axes is None:
        shapes = " or ".join(f"({', '.join(axes)})" for axes in ranks)
        raise InvalidCall(
            argument,
            f"dtype {dtype}, shape {shape}",
            f"{'an integer' if wanted == 'int' else 'a boolean'} array of shape {shapes}",
            "Numbers that are added to scores go to bias=" if wanted == "bool" else None,
        )
    left = tuple(axis for axis, extent in zip(axes, shape, strict=True) if extent != 1)
    table = Table(array if left == axes else array.squeeze(), wanted)
    return _Array(table, left, _Needs(argument, shape, tuple(axis.replace("token", token) for axis in axes)))


def _read(array: _Array, place: str = "") -> Expr:
    """The array at the current pair, its "token" axis at variable `place`."""
    return array.table[tuple(var(axis.replace("token", place)) for axis in array.axes)]
