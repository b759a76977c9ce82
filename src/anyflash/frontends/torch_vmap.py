"""How the operators of torch_op.py are mapped by torch.func.vmap.

A mapped dense call is one call with the mapped axis folded into the batch: entry `i` of mapping `n` becomes
batch entry `n * size + i`. The program then says `batch % size` for batch, and mapped tables gain a first
axis, read at `batch // size`. That is exact but for dropout, whose numbers depend on the batch entry, and for
mapped sinks and packed calls, which have no such axis; those run once for each mapped entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from anyflash.frontends.torch_op import BACKWARD, FORWARD, LIBRARY
from anyflash.semantics import text
from anyflash.semantics.expr import Expr, var
from anyflash.semantics.problem import Program


@lru_cache(maxsize=1024)
def _fold_program(program: str, size: int, mapped: tuple[bool, ...]) -> str:
    """`program` for a batch of several mapped calls with `size` entries each."""
    parsed = Program.parse(program)

    def fold(expression: str | None) -> str | None:
        return None if expression is None else text.show(_fold_expr(text.parse(expression), size, mapped))

    return str(replace(parsed, score=fold(parsed.score), mask=fold(parsed.mask), factor=fold(parsed.factor)))


def _fold_expr(expr: Expr, size: int, mapped: tuple[bool, ...]) -> Expr:
    if expr.op == "var":
        return expr % size if expr.value == "batch" else expr
    args = tuple([_fold_expr(a, size, mapped) for a in expr.args])
    if expr.op == "load" and mapped[expr.value]:
        args = (var("batch") // size, *args)
    return Expr(expr.op, args, expr.value, expr.kind)


def _to_front(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """(count, ...) with the mapped axis first; an unmapped tensor is stretched without a copy."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _fold(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    return _to_front(tensor, dim, count).flatten(0, 1)


def _can_fold(program: str, sinks_dim: int | None) -> bool:
    return sinks_dim is None and Program.parse(program).dropout_p == 0.0


def _loop(op: Callable[..., Any], count: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """One call for each mapped entry; results stacked along a new first axis."""

    def pick(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [pick(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    calls = [op(*[pick(a, d, i) for a, d in zip(args, in_dims, strict=True)]) for i in range(count)]
    return [torch.stack(parts) for parts in zip(*calls, strict=True)]


def _map_attention(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    """The dense forward."""
    q, k, v, tables, sinks, seed, names, program, layout, backend = args
    dim_q, dim_k, dim_v, dim_tables, dim_sinks, *_ = in_dims
    count = info.batch_size
    if not _can_fold(program, dim_sinks):
        return _map_by_loop(FORWARD["attention"], info, in_dims, args)
    size = q.shape[0] if dim_q is None else q.movedim(dim_q, 0).shape[1]
    mapped = tuple([dim is not None for dim in dim_tables])
    out, lse, stats = FORWARD["attention"](
        _fold(q, dim_q, count),
        _fold(k, dim_k, count),
        _fold(v, dim_v, count),
        [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tables, dim_tables, strict=True)],
        sinks,
        seed,
        names,
        _fold_program(program, int(size), mapped),
        layout,
        backend,
    )
    unfold = (count, size)
    return (out.unflatten(0, unfold), lse.unflatten(0, unfold), stats.unflatten(1, unfold)), (0, 0, 1)


def _map_attention_backward(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    """The dense backward. Tables whose gradient is wanted are mapped, so that each entry's is kept apart."""
    dout, dlse, out, stats, q, k, v, tables, sinks, seed, names, program, layout, backend, wants = args
    dim_dout, dim_dlse, dim_out, dim_stats, dim_q, dim_k, dim_v, dim_tables, dim_sinks, *_ = in_dims
    count = info.batch_size
    if wants[-1] or not _can_fold(program, dim_sinks):
        return _map_by_loop(BACKWARD["attention"], info, in_dims, args)
    size = q.shape[0] if dim_q is None else q.movedim(dim_q, 0).shape[1]
    mapped = tuple([dim is not None or want for dim, want in zip(dim_tables, wants, strict=False)])
    grads = BACKWARD["attention"](
        None if dout is None else _fold(dout, dim_dout, count),
        None if dlse is None else _fold(dlse, dim_dlse, count),
        _fold(out, dim_out, count),
        _to_front(stats, dim_stats, count).transpose(0, 1).flatten(1, 2),
        _fold(q, dim_q, count),
        _fold(k, dim_k, count),
        _fold(v, dim_v, count),
        [
            _to_front(t, dim, count) if apart else t
            for t, dim, apart in zip(tables, dim_tables, mapped, strict=True)
        ],
        sinks,
        seed,
        names,
        _fold_program(program, int(size), mapped),
        layout,
        backend,
        wants,
    )
    rows = [grad.unflatten(0, (count, size)) for grad in grads[:3]]
    return [*rows, *grads[3:]], [0] * len(grads)


def _map_by_loop(op: Callable[..., Any], info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    stacked = _loop(op, info.batch_size, in_dims, args)
    if op in FORWARD.values():
        return tuple(stacked), (0, 0, 0)
    return stacked, [0] * len(stacked)


def _register(name: str, rule: Callable[..., Any]) -> None:
    torch.library.register_vmap(f"anyflash::{name}", rule, lib=LIBRARY)


_register("attention", _map_attention)
_register("attention_backward", _map_attention_backward)
for _op in (FORWARD["attention_varlen"], BACKWARD["attention_varlen"]):

    def _map_varlen(info: Any, in_dims: Sequence[Any], *args: Any, op: Any = _op) -> Any:
        return _map_by_loop(op, info, in_dims, args)

    _register(_op._schema.name.split("::")[1], _map_varlen)
