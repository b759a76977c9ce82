"""The torch library operators `anyflash::attention` and `anyflash::attention_varlen`, and their backwards.

All of a call but its tensors travels as short strings: the names of the tables (for messages), the program
(a `Program`'s text), the layout and the backend. So the operators are opaque to torch.compile and export, and
their fakes are a matter of shapes. How they differentiate is in torch_autograd.py, how they are mapped in
torch_vmap.py.

`attention_varlen` has three arguments more, the lengths; functions here serve both and collect what follows
the sinks in `*rest`, which `split` takes apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyflash.core.errors import InvalidCall
from anyflash.core.view import View
from anyflash.dispatch.plan import execute_forward, plan, run_backward
from anyflash.frontends.torch_arrays import fake_results, new_results, statistic, view
from anyflash.semantics.describe import describe
from anyflash.semantics.operands import Gradients, Operands, Saved
from anyflash.semantics.problem import Problem

_LENGTHS = {
    "attention": "",
    "attention_varlen": "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_k, ",
}
_ARRAYS = "Tensor q, Tensor k, Tensor v, Tensor[] tables, Tensor? sinks, {lengths}Tensor? seed, "
_CALL = "str names, str program, str layout, str? backend"
_FORWARD = "{kind}(" + _ARRAYS + _CALL + ") -> (Tensor out, Tensor lse, Tensor stats)"
_BACKWARD = (
    "{kind}_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor stats, "
    + _ARRAYS
    + _CALL
    + ", bool[] wants) -> Tensor[]"
)
_TAGS = (torch.Tag.needs_exact_strides,)

KINDS = tuple(_LENGTHS)
LIBRARY = torch.library.Library("anyflash", "DEF")


def split(rest: Sequence[Any]) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Any]]:
    """((cu_seqlens_q, cu_seqlens_k, seqused_k) or (), seed, (names, program, layout, backend))."""
    return rest[:-5], rest[-5], rest[-4:]


def forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    problem, operands = _describe(q, k, v, tables, sinks, rest)
    layout, backend = rest[-2:]
    made, results = new_results(layout, q, v)
    execute_forward(plan(problem, operands.q.device, backend), operands, results)
    return made


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], sinks: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    lengths, _, (names, _, layout, _) = split(rest)
    named = names.split(",") if names else []
    arguments = ["k", "v", *named, "sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"]
    # A tensor on "meta" among others brings a call here that `describe` would have refused.
    for argument, tensor in zip(arguments, (k, v, *tables, sinks, *lengths), strict=False):
        if tensor is not None and tensor.device != q.device:
            raise InvalidCall(
                argument,
                f"on device {tensor.device}",
                f"{q.device}, the device of q",
                "All arrays of a call lie on one device",
            )
    return fake_results(layout, q, v)


def backward_kernel(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    sinks: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    """[dq, dk, dv, *gradients of the wanted tables, dsinks if wanted].

    The last of `rest` is `wants`, a bool for each table and one for the sinks.
    """
    *rest, wants = rest
    problem, operands = _describe(q, k, v, tables, sinks, rest, tuple(wants[:-1]))
    layout, backend = rest[-2:]
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    sums = statistic(q)
    dtables = [
        table.new_empty(table.shape, dtype=sums) if wanted else None
        for table, wanted in zip(tables, wants, strict=False)
    ]
    dsinks = None if sinks is None else sinks.new_empty(sinks.shape, dtype=sums)
    saved = Saved(
        _canonical(layout, out),
        view(stats),
        _canonical(layout, dout),
        None if dlse is None else view(dlse),
    )
    gradients = Gradients(
        _canonical(layout, dq),
        _canonical(layout, dk),
        _canonical(layout, dv),
        tuple([None if grad is None else view(grad) for grad in dtables]),
        None if dsinks is None else view(dsinks),
    )
    run_backward(problem, operands, saved, gradients, backend)
    grads = [grad.to(table.dtype) for grad, table in zip(dtables, tables, strict=True) if grad is not None]
    if wants[-1]:
        grads.append(dsinks.to(sinks.dtype))
    return [dq, dk, dv, *grads]


def _backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    sinks: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    wants = rest[-1]
    wanted = [array for array, want in zip((*tables, sinks), wants, strict=True) if want]
    return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)] + [
        array.new_empty(array.shape) for array in wanted
    ]


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    sinks: Tensor | None,
    rest: Sequence[Any],
    needs_grad: Sequence[bool] = (),
) -> tuple[Problem, Operands]:
    lengths, seed, (names, program, layout, _) = split(rest)
    cu_seqlens_q, cu_seqlens_k, seqused_k = [None if t is None else view(t) for t in lengths or (None,) * 3]
    return describe(
        program,
        view(q),
        view(k),
        view(v),
        layout=layout,
        tables=tuple([view(table) for table in tables]) if tables else (),
        names=names.split(",") if names else (),
        needs_grad=needs_grad,
        sinks=None if sinks is None else view(sinks),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        seed=0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
    )


def _canonical(layout: str, rows: Tensor) -> View:
    made = view(rows)
    return made.permute((0, 2, 1, 3)) if layout == "bhsd" else made


def _register(schema: str, kind: str, kernel: Any, fake: Any) -> Any:
    schema = schema.format(kind=kind, lengths=_LENGTHS[kind])
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"anyflash::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.anyflash, name).default


FORWARD = {kind: _register(_FORWARD, kind, forward_kernel, _forward_fake) for kind in KINDS}
BACKWARD = {kind: _register(_BACKWARD, kind, backward_kernel, _backward_fake) for kind in KINDS}
