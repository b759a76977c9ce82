"""Runs a mask or score function written with torch once with symbols: it leaves an expression, not a matrix.

transformers builds every mask pattern as a function of (batch, head, query, key) indices, FlexAttention masks
and scores alike: comparisons, arithmetic, elementary functions, and lookups in tensors (padding, document
numbers, slopes). Called with `Symbol`s, such a function yields the same formula in our language, which a
kernel evaluates tile by tile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from anyflash import api
from anyflash.semantics.expr import Expr, Table, as_float, const, exp, log, maximum, minimum, tanh, where


class NotTraceable(TypeError):
    """The function does something that has no symbol."""


class Symbol:
    """An `Expr` with as much of a tensor's behaviour as mask and score functions use."""

    __slots__ = ("expr",)
    device = torch.device("cpu")

    def __init__(self, expr: Expr) -> None:
        self.expr = expr

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Symbol:
        return _apply(func, args, kwargs or {})

    def to(self, *args: object, **kwargs: object) -> Symbol:
        """Devices and widths mean nothing here; a cast to another kind of number does."""
        dtypes = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        wanted = _kind(dtypes[0]) if dtypes else self.expr.kind
        if wanted == self.expr.kind:
            return self
        if wanted == "bool":
            return self != 0
        if wanted == "float":
            return Symbol(as_float(self.expr))
        raise NotTraceable(f"a {self.expr.kind} expression made {dtypes[0]}")

    def bool(self) -> Symbol:
        return self.to(torch.bool)

    def float(self) -> Symbol:
        return self.to(torch.float32)

    def new_ones(self, shape: Sequence[int], **kwargs: object) -> Symbol:
        return self._filled(True, shape, kwargs)

    def new_zeros(self, shape: Sequence[int], **kwargs: object) -> Symbol:
        return self._filled(False, shape, kwargs)

    def _filled(self, value: bool, shape: Sequence[int], kwargs: Mapping[str, object]) -> Symbol:
        if tuple(shape) or kwargs.get("dtype") != torch.bool:
            raise NotTraceable(f"a new tensor of shape {tuple(shape)} and dtype {kwargs.get('dtype')}")
        return Symbol(const(value))

    def __and__(self, other: object) -> Symbol:
        return Symbol(conjunction(self.expr, to_expr(other)))

    def __or__(self, other: object) -> Symbol:
        return Symbol(_disjunction(self.expr, to_expr(other)))

    __rand__ = __and__
    __ror__ = __or__

    def __invert__(self) -> Symbol:
        return Symbol(~self.expr)

    def __neg__(self) -> Symbol:
        return Symbol(-self.expr)

    def __abs__(self) -> Symbol:
        return Symbol(abs(self.expr))

    def abs(self) -> Symbol:
        return abs(self)

    def tanh(self) -> Symbol:
        return Symbol(tanh(self.expr))

    def exp(self) -> Symbol:
        return Symbol(exp(self.expr))

    def log(self) -> Symbol:
        return Symbol(log(self.expr))

    def __bool__(self) -> bool:
        raise NotTraceable("a Python condition on an index")

    __hash__ = None  # type: ignore[assignment]


def _binary(name: str, combine: Callable[[Any, Any], Any]) -> None:
    def forward(self: Symbol, other: object) -> Symbol:
        return Symbol(combine(self.expr, to_expr(other)))

    def backward(self: Symbol, other: object) -> Symbol:
        return Symbol(combine(to_expr(other), self.expr))

    setattr(Symbol, f"__{name}__", forward)
    if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Symbol, f"__r{name}__", backward)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne"):
    _binary(_name, getattr(operator, _name))


def to_expr(value: object) -> Expr:
    """The expression of a Symbol, a number, or a tensor of one element; one that requires a gradient stays an
    array, so that it gets it."""
    if isinstance(value, Symbol):
        return value.expr
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise NotTraceable(f"a tensor of shape {tuple(value.shape)} beside an index")
        if value.requires_grad:
            return api.table(value.reshape(1))[const(0)]
        value = value.item()
    return const(value)  # type: ignore[arg-type]


def conjunction(a: Expr, b: Expr) -> Expr:
    """`a & b` without a constant true, with which transformers begins its conjunctions."""
    if a.op == "const" and a.value is True:
        return b
    return a if b.op == "const" and b.value is True else a & b


def _disjunction(a: Expr, b: Expr) -> Expr:
    if a.op == "const" and a.value is False:
        return b
    return a if b.op == "const" and b.value is False else a | b


def _lookup(tensor: torch.Tensor, index: Any, tables: dict[Any, Table]) -> Symbol:
    """`tensor[index]`, one Symbol or number an axis. `tables` keeps what was made, one table an array.

    An axis of extent 1 has one valid index, so it is dropped: a table that depends on the key alone lets a
    kernel bound it over a block of keys.
    """
    items = _items(index)
    if len(items) != tensor.ndim or any(isinstance(i, slice) or i is None or i is Ellipsis for i in items):
        raise NotTraceable(f"indexing a tensor of shape {tuple(tensor.shape)} with {len(items)} indices")
    exprs = [to_expr(item) for item in items]
    fixed = {
        axis: 0 if extent == 1 else expr.value
        for axis, (extent, expr) in enumerate(zip(tensor.shape, exprs, strict=True))
        if extent == 1 or expr.op == "const"
    }
    part = tensor[tuple(fixed.get(axis, slice(None)) for axis in range(tensor.ndim))]
    kept = tuple(expr for axis, expr in enumerate(exprs) if axis not in fixed)
    if not kept:
        return Symbol(to_expr(part))
    key = (part.data_ptr(), part.shape, part.stride(), part.dtype)
    if key not in tables:
        tables[key] = api.table(part)
    return Symbol(tables[key][kept])


_OPERATORS: dict[Any, Callable[..., Any]] = {
    getattr(torch.Tensor, f"__{name}__"): getattr(operator, name)
    for name in ("lt", "le", "gt", "ge", "eq", "ne", "floordiv", "mod", "truediv")
}
_OPERATORS |= {
    torch.Tensor.add: operator.add,
    torch.Tensor.sub: operator.sub,
    torch.Tensor.mul: operator.mul,
    torch.Tensor.__and__: operator.and_,
    torch.Tensor.__or__: operator.or_,
    torch.Tensor.__add__: operator.add,
    torch.Tensor.__sub__: operator.sub,
    torch.Tensor.__rsub__: lambda a, b: b - a,
    torch.Tensor.__mul__: operator.mul,
    torch.logical_and: operator.and_,
    torch.logical_or: operator.or_,
    torch.logical_not: operator.invert,
    torch.Tensor.__rmul__: lambda a, b: b * a,
    torch.Tensor.__radd__: lambda a, b: b + a,
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.mul: operator.mul,
    torch.div: operator.truediv,
    torch.neg: operator.neg,
    torch.abs: operator.abs,
    torch.tanh: Symbol.tanh,
    torch.exp: Symbol.exp,
    torch.log: Symbol.log,
    torch.sigmoid: lambda a: 1.0 / (1.0 + (-a).exp()),
    torch.minimum: lambda a, b: Symbol(minimum(a.expr, b.expr)),
    torch.maximum: lambda a, b: Symbol(maximum(a.expr, b.expr)),
}


def _apply(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Symbol:
    if kwargs:
        raise NotTraceable(f"{func} with {sorted(kwargs)}")
    if func is torch.where and len(args) == 3:
        return Symbol(where(*(to_expr(a) for a in args)))
    if func not in _OPERATORS:
        raise NotTraceable(f"{getattr(func, '__name__', func)} of an index")
    return _OPERATORS[func](*(Symbol(to_expr(a)) for a in args))


def _items(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


class _Lookups(TorchFunctionMode):
    """Lets `tensor[symbol, symbol]` through to `_lookup`: torch asks the indexed tensor, never the index."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[Any, Table] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.__getitem__ and any(isinstance(i, Symbol) for i in _items(args[1])):
            return _lookup(args[0], args[1], self.tables)
        if any(isinstance(a, Symbol) for a in (*args, *(kwargs or {}).values())):
            return _apply(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def trace(function: Callable[..., Any], *arguments: Expr) -> Expr:
    """The formula that `function`, written for tensors, is of `arguments`.

    Raises NotTraceable if it does something that has no symbol.
    """
    try:
        with _Lookups():
            return to_expr(function(*(Symbol(argument) for argument in arguments)))
    except (AttributeError, TypeError, IndexError) as error:
        raise NotTraceable(f"{getattr(function, '__name__', function)}: {error}") from error


def trace_mask(mask_function: Callable[..., Any], batch: Expr, head: Expr, q: Expr, k: Expr) -> Expr:
    """`trace` of a function that gives a condition."""
    expr = trace(mask_function, batch, head, q, k)
    if expr.kind != "bool":
        raise NotTraceable(f"the mask function gave a {expr.kind}")
    return expr


def _kind(dtype: torch.dtype) -> str:
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"
