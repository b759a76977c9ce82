"""How the operators of torch_op.py differentiate.

`torch.library.register_autograd` would do for plain autograd, but it refuses functorch transforms
(torch.func.grad) and costs 35 us a call where an operator takes a list of tensors; so the Autograd kernels
are written out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _after_autograd_keyset,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
)
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from anyflash.core.errors import Unsupported
from anyflash.frontends.torch_op import (
    BACKWARD,
    FORWARD,
    KINDS,
    LIBRARY,
    backward_kernel,
    forward_kernel,
    split,
)


class _Attention(torch.autograd.Function):
    """One forward below autograd; its backward calls the backward operator through the dispatcher.

    Tensors of a list must be arguments of their own to take part in autograd, hence the flat signature.
    """

    @staticmethod
    def forward(ctx: Any, keyset: DispatchKeySet, kind: str, call: tuple[Any, ...], *flat: Any) -> Any:
        """flat: q, k, v, sinks, seed, cu_seqlens_q, cu_seqlens_k, seqused_k, *tables."""
        results = _below_function(FORWARD[kind], forward_kernel, keyset, *_arguments(kind, flat), *call)
        out, _, stats = results
        ctx.save_for_backward(out, stats, *flat)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.call = kind, call
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, dstats: None) -> Any:
        needs = ctx.needs_input_grad[3:]
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        out, stats, *flat = ctx.saved_tensors
        wants = [*needs[_TABLES:], needs[_SINKS]]
        dq, dk, dv, *rest = BACKWARD[ctx.kind](
            dout, dlse, out, stats, *_arguments(ctx.kind, flat), *ctx.call, wants
        )
        given = iter(rest)
        dtables = [next(given) if wanted else None for wanted in wants[:-1]]
        dsinks = next(given, None)
        return (None, None, None, dq, dk, dv, dsinks, None, None, None, None, *dtables)


_SINKS, _TABLES = 3, 8


def _arguments(kind: str, flat: Sequence[Any]) -> tuple[Any, ...]:
    """The operator's arguments up to the seed, from the flat order of `_Attention`."""
    q, k, v, sinks, seed, cu_seqlens_q, cu_seqlens_k, seqused_k, *tables = flat
    if kind == "attention":
        return q, k, v, tables, sinks, seed
    return q, k, v, tables, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, seed


class _Gradients(torch.autograd.Function):
    """The gradients of attention, a function without a derivative: the error comes when one is asked for."""

    @staticmethod
    def forward(ctx: Any, keyset: DispatchKeySet, kind: str, args: tuple[Any, ...], *flat: Any) -> Any:
        return tuple(_below_function(BACKWARD[kind], backward_kernel, keyset, *args))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise Unsupported(
            "the second derivative of attention",
            {"torch": ["the gradient of attention is itself not differentiable"]},
            "Where second derivatives are needed, call torch.nn.functional.scaled_dot_product_attention "
            "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
        )


# What is left of a call on ordinary CPU tensors below autograd: the kernel. Calling that directly saves the
# 5 us of another pass through the dispatcher. Any mode, transform or other kind of tensor adds a key.
_PLAIN = DispatchKeySet(DispatchKey.CPU)


def _below(op: Any, kernel: Any, keyset: DispatchKeySet, *args: Any) -> Any:
    """Call `op` under the Autograd kernel that was given `keyset`."""
    below = keyset & _after_autograd_keyset
    if below == _PLAIN:
        return kernel(*args)
    with _AutoDispatchBelowAutograd():
        return op.redispatch(below, *args)


def _below_function(op: Any, kernel: Any, keyset: DispatchKeySet, *args: Any) -> Any:
    """`_below` for the forward of a Function, which torch runs without gradients: functorch levels further
    out want theirs."""
    if not _are_functorch_transforms_active():
        return _below(op, kernel, keyset, *args)
    with torch.enable_grad():
        return _below(op, kernel, keyset, *args)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply` at the level at which the Autograd kernel that calls this runs.

    `Function.apply` itself would start at the outermost functorch level, and asks for a form
    (`setup_context`) that costs 20 us a call. The method behind it in the class order is the one level's.
    """
    apply = super(torch.autograd.Function, function).apply
    if not _are_functorch_transforms_active():
        return apply(*args)
    with enable_single_level_autograd_function():
        return apply(*args)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Without this the tangents of forward-mode differentiation would be dropped in silence."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise Unsupported(
            "forward-mode differentiation of attention",
            {"torch": ["attention has a reverse-mode gradient only"]},
            "Use torch.func.vjp or torch.func.jacrev in place of jvp or jacfwd",
        )


def _register(kind: str) -> None:
    forward, backward = FORWARD[kind], BACKWARD[kind]

    def attention(
        keyset: DispatchKeySet,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Sequence[Tensor],
        sinks: Tensor | None,
        *rest: Any,
    ) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(q, k, v, sinks, *tables)
        if torch.is_grad_enabled() and _any_requires_grad(q, k, v, tables, sinks):
            lengths, seed, call = split(rest)
            flat = (q, k, v, sinks, seed, *(lengths or (None, None, None)), *tables)
            return _apply(_Attention, keyset, kind, call, *flat)
        return _below(forward, forward_kernel, keyset, q, k, v, tables, sinks, *rest)

    def gradients(keyset: DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            tensors = [a for arg in args for a in (arg if isinstance(arg, list) else (arg,))]
            return list(_apply(_Gradients, keyset, kind, args, *tensors))
        return _below(backward, backward_kernel, keyset, *args)

    LIBRARY.impl(kind, attention, "Autograd", with_keyset=True)
    LIBRARY.impl(f"{kind}_backward", gradients, "Autograd", with_keyset=True)


for _kind in KINDS:
    _register(_kind)
