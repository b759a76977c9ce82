"""The keyword arguments of a call as one Program and its tables.

Only shapes and dtypes are looked at, so this runs on traced arrays too. Calls without a user's function are
looked up by what their keywords say; a user's function is called once, with symbols, at every call.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from anyflash.core.dtypes import FLOATS
from anyflash.core.errors import InvalidCall
from anyflash.semantics import text
from anyflash.semantics.addressing import to_canonical
from anyflash.semantics.checks import check_layout, check_rank
from anyflash.semantics.descale import FACTORS, Descale, Dtype, Extents, Given, descaled, real
from anyflash.semantics.expr import At, Expr, Table, as_float, const, tanh, var
from anyflash.semantics.mask import Mask
from anyflash.semantics.problem import Program

_MAX_KEPT = 4096
_AXES = ("batch", "head", "row", "k")
_AT = At()

Plain = tuple[
    bool, "tuple[int | None, int | None] | None", float | None, float | None, float, bool, float | None, bool
]


class Described(NamedTuple):
    """A program's text, the arrays of its tables in slot order, and the argument each came from."""

    program: str
    tables: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()


_programs: dict[tuple[Any, ...], str] = {}


def describe_program(
    q_shape: Sequence[int],
    k_shape: Sequence[int] | None,
    dtype: Dtype,
    *,
    layout: str = "bshd",
    sequences: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    score: Callable[[Expr, At], Any] | None = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    descale: Descale | None = None,
    deterministic: bool = True,
) -> Described:
    """The program that the keywords spell, and its tables.

    q_shape, k_shape   shapes of the user's arrays, in `layout`; None for keys in a cache
    dtype              names the element type of an array, given the argument it came as and itself
    sequences          how many sequences a packed call has
    descale            the factors of 8-bit floats, None where there are none
    the others         as in `anyflash.attention`

    The order is fixed: factors, `score`, softcap, ALiBi, biases as listed. Masks are and-ed. Tables are the
    user's own arrays, without their axes of extent 1 where a keyword stretches those.

    Raises InvalidCall.
    """
    given: list[Given] = []
    arrays: list[Any] = []
    scale, factor = None if scale is None else _scale(scale), None
    last: list[tuple[Given, Any]] = []
    if descale is not None:
        extents = _extents(q_shape, k_shape, layout, sequences)
        scale, factor, factors = descaled(descale, scale, q_shape[-1], dtype, extents)
        # In the order in which the program will read them: scores, masks, and then the factor of out.
        last = [(g, array) for g, array in factors if g.name == "descale_v"]
        first = [(g, array) for g, array in factors if g.name != "descale_v"]
        given, arrays = [g for g, _ in first], [array for _, array in first]
    plain: Plain = (
        _flag("causal", causal),
        None if window is None else _window(window),
        scale,
        None if softcap is None else _softcap(softcap),
        0.0 if type(dropout_p) is float and dropout_p == 0.0 else _dropout(dropout_p),
        sinks is not None,
        factor,
        deterministic,
    )
    if bias is not None or alibi_slopes is not None or mask is not None:
        extents = _extents(q_shape, k_shape, layout, sequences)
        if alibi_slopes is not None:
            given.append(_slopes(alibi_slopes, dtype, extents))
            arrays.append(alibi_slopes)
        for name, array in _listed(bias):
            given.append(_stretched(name, array, dtype, extents))
            arrays.append(array)
        if isinstance(mask, Mask):
            mask.check(*extents)
        elif mask is not None and not callable(mask):
            given.append(_stretched("mask", mask, dtype, extents))
            arrays.append(mask)
            mask = None
    for g, array in last:
        given.append(g)
        arrays.append(array)
    if score is not None or mask is not None:
        return _build(plain, given, arrays, score, mask)
    program = _keyword_program(plain, tuple(given))
    if not given:
        return Described(program)
    return Described(
        program,
        tuple([_squeeze(array, g) for array, g in zip(arrays, given, strict=True)]),
        tuple([g.name for g in given]),
    )


def _keyword_program(plain: Plain, given: tuple[Given, ...]) -> str:
    """The program's text of a call without a user's function, from the table or made now."""
    key = (plain, given)
    program = _programs.get(key)
    if program is None:
        if len(_programs) >= _MAX_KEPT:
            _programs.clear()
        placeholders = [_Placeholder((1,) * len(g.axes)) for g in given]
        program = _programs[key] = _build(plain, given, placeholders, None, None).program
    return program


# torch.compile calls this while it traces and keeps the answer; were it to trace it, every change of the
# table would compile the caller anew.
_keyword_program._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Placeholder(NamedTuple):
    """Stands for a squeezed array while a program to be kept is built: that must not keep the array."""

    shape: tuple[int, ...]

    def squeeze(self) -> _Placeholder:
        return self


def _squeeze(array: Any, given: Given) -> Any:
    return array if len(given.axes) == given.ndim else array.squeeze()


def _build(plain: Plain, given: Sequence[Given], arrays: Sequence[Any], score: Any, mask: Any) -> Described:
    """Compose the program. `arrays` go with `given`; `score` and `mask` are the user's functions."""
    causal, window, scale, softcap, dropout_p, sinks, constant, deterministic = plain
    s, factor, loads, named = _loaded(given, arrays, None if constant is None else const(constant))
    if score is not None:
        s = _call_score(score, s)
    if softcap is not None:
        s = softcap * tanh(s / softcap)
    allowed: list[Expr] = []
    if causal:
        allowed.append(_AT.k <= _AT.q)
    if window is not None:
        left, right = window
        if left is not None:
            allowed.append(_AT.q - left <= _AT.k)
        if right is not None:
            allowed.append(_AT.k <= _AT.q + right)
    if mask is not None:
        allowed.append(_call_mask(mask))
    for g, load in loads:
        if g.name == "alibi_slopes":
            s = s - load * abs(_AT.q - _AT.k)
        elif g.kind == "bool":
            allowed.append(load)
        else:
            s = s + load
    (bound_score, bound_mask, bound_factor), tables = text.bind([s, _all(allowed), factor])
    score_text = None if bound_score is None or bound_score.op == "var" else text.show(bound_score)
    mask_text = None if bound_mask is None else text.show(bound_mask)
    factor_text = None if bound_factor is None else text.show(bound_factor)
    return Described(
        str(Program(score_text, mask_text, scale, dropout_p, sinks, factor_text, deterministic)),
        tuple([table.array for table in tables]),
        tuple([_name(table, slot, named) for slot, table in enumerate(tables)]),
    )


def _loaded(
    given: Sequence[Given], arrays: Sequence[Any], factor: Expr | None
) -> tuple[Expr, Expr | None, list[tuple[Given, Expr]], list[tuple[Any, str]]]:
    """The score with its factors, the factor of out, the loads of all else, and what array is whose."""
    s = var("score")
    loads: list[tuple[Given, Expr]] = []
    named: list[tuple[Any, str]] = []
    for g, array in zip(given, arrays, strict=True):
        squeezed = _squeeze(array, g)
        named.append((squeezed, g.name))
        load = Table(squeezed, g.kind)[tuple(_index(axis) for axis in g.axes)]
        if g.name == "descale_v":
            factor = load
        elif g.name in FACTORS:
            s = s * load
        else:
            loads.append((g, load))
    return s, factor, loads, named


def _index(axis: str) -> Expr:
    """Of a variable, or of a key head: "head // 4"."""
    name, _, group = axis.partition(" // ")
    return var(name) // int(group) if group else var(name)


def _name(table: Table, slot: int, named: list[tuple[Any, str]]) -> str:
    for array, name in named:
        if array is table.array:
            return name
    return f"table {slot}"


def _all(conditions: Sequence[Expr]) -> Expr | None:
    kept = [c for c in conditions if not (c.op == "const" and c.value)]
    if not kept:
        return None
    whole = kept[0]
    for condition in kept[1:]:
        whole = whole & condition
    return whole


def _call_score(score: Any, s: Expr) -> Expr:
    if not callable(score):
        raise InvalidCall("score", f"type {type(score).__name__}", "a function of (score, at)")
    result = score(s, _AT)
    expr = _expression("score", result, "a number for every score")
    if expr.kind == "bool":
        raise InvalidCall(
            "score",
            f"the function returned the condition {text.pretty(expr)}",
            "a number for every score",
            "anyflash.where(condition, a, b) makes a number of it; pass conditions as mask=",
        )
    return as_float(expr)


def _call_mask(mask: Any) -> Expr:
    expr = _expression("mask", mask(_AT), "a condition that holds where a query may see a key")
    if expr.kind != "bool":
        raise InvalidCall(
            "mask",
            f"the function returned the number {text.pretty(expr)}",
            "a condition that holds where a query may see a key",
            "Compare it with something, or pass numbers to be added as score= or bias=",
        )
    return expr


def _expression(argument: str, result: Any, expected: str) -> Expr:
    if isinstance(result, Expr):
        return result
    if isinstance(result, (bool, int, float)) or getattr(result, "ndim", None) == 0:
        return const(result)
    found = "None" if result is None else f"type {type(result).__name__}"
    raise InvalidCall(
        argument,
        f"the function returned {found}",
        expected,
        "It is called once with symbols: build the result from its arguments with operators and "
        "anyflash.where, tanh, exp, log, minimum, maximum and table",
    )


def _extents(
    q_shape: Sequence[int], k_shape: Sequence[int] | None, layout: str, sequences: int | None
) -> Extents:
    """(batch, query heads, queries, keys); the last two are None where lengths are not known from shapes."""
    check_layout(layout, sequences is not None)
    check_rank("q", q_shape, layout)
    if k_shape is not None:
        check_rank("k", k_shape, layout)
    if sequences is not None:
        return sequences, q_shape[1], None, None
    q = to_canonical(layout, tuple(q_shape))
    return q[0], q[2], q[1], None if k_shape is None else to_canonical(layout, tuple(k_shape))[1]


def _listed(bias: Any) -> list[tuple[str, Any]]:
    if bias is None:
        return []
    if isinstance(bias, (list, tuple)):
        arrays = cast("Sequence[Any]", bias)
        return [(f"bias[{i}]", array) for i, array in enumerate(arrays)]
    return [("bias", bias)]


def _stretched(name: str, array: Any, dtype: Dtype, extents: Extents) -> Given:
    """A bias, or a dense mask: broadcast to (batch, heads, q, k), read only along the axes that vary."""
    wanted = ("bool",) if name == "mask" else FLOATS
    found = dtype(name, array)
    shape = tuple(array.shape)
    if found not in wanted:
        hint = "Pass numbers that are added to scores as bias=" if name == "mask" else None
        if name != "mask" and found == "bool":
            hint = "Pass conditions as mask="
        raise InvalidCall(
            name,
            f"dtype {found}, shape {shape}",
            f"one of {', '.join(wanted)}" if len(wanted) > 1 else wanted[0],
            hint,
        )
    missing = 4 - len(shape)
    aligned = (1,) * missing + shape
    fits = missing >= 0 and all(
        have == 1 or want is None or have == want for have, want in zip(aligned, extents, strict=True)
    )
    if not fits:
        shown = ", ".join("any" if extent is None else str(extent) for extent in extents)
        raise InvalidCall(
            name, f"shape {shape}", f"a shape that broadcasts to (batch, heads, q, k) = ({shown})"
        )
    axes = tuple(axis for axis, extent in zip(_AXES, aligned, strict=True) if extent != 1)
    return Given(name, len(shape), "bool" if found == "bool" else "float", axes)


def _slopes(array: Any, dtype: Dtype, extents: Extents) -> Given:
    found, shape = dtype("alibi_slopes", array), tuple(array.shape)
    batch, heads = extents[:2]
    if found not in FLOATS:
        raise InvalidCall("alibi_slopes", f"dtype {found}, shape {shape}", f"one of {', '.join(FLOATS)}")
    if shape not in ((heads,), (batch, heads)):
        raise InvalidCall(
            "alibi_slopes", f"shape {shape}", f"({heads},) or ({batch}, {heads}): one slope a query head"
        )
    return Given("alibi_slopes", len(shape), "float", ("batch", "head")[2 - len(shape) :])


def _flag(argument: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    if getattr(value, "ndim", None) == 0 and getattr(value.dtype, "kind", None) == "b":
        return bool(value)
    raise InvalidCall(argument, repr(value), "True or False")


def _window(window: Any) -> tuple[int | None, int | None] | None:
    expected = "None or (left, right), each a number of keys of at least 0 or None"
    shown = repr(window)
    given = cast("Sequence[Any]", window) if isinstance(window, (tuple, list)) else ()
    if len(given) != 2:
        raise InvalidCall(
            "window", shown, expected, "(left, right) sees keys q - left to q + right, both included"
        )
    sides: list[int | None] = []
    for side in given:
        if side is None:
            sides.append(None)
            continue
        if isinstance(side, bool) or not hasattr(side, "__index__"):
            raise InvalidCall("window", shown, expected)
        sides.append(operator.index(side))
        if operator.index(side) < 0:
            raise InvalidCall("window", shown, expected, "None stands for a side without bound, not -1")
    left, right = sides
    return None if left is None and right is None else (left, right)


def _scale(scale: Any) -> float:
    expected = "None or a finite number"
    value = real("scale", scale, expected)
    if not math.isfinite(value):
        raise InvalidCall("scale", repr(value), expected, "None is head_dim ** -0.5")
    return value


def _softcap(softcap: Any) -> float:
    expected = "None or a finite number above 0"
    value = real("softcap", softcap, expected)
    if not (value > 0 and math.isfinite(value)):
        raise InvalidCall("softcap", repr(value), expected, "None turns it off")
    return value


def _dropout(dropout_p: Any) -> float:
    expected = "a number from 0.0, included, to 1.0, excluded"
    value = real("dropout_p", dropout_p, expected)
    if not 0 <= value < 1:
        raise InvalidCall("dropout_p", repr(value), expected)
    return value
