"""The torch operators over a KV cache: `anyflash::attention_kvcache`, which only reads it, and
`anyflash::attention_kvcache_append`, which writes new keys and values into it first.

Both are opaque to torch.compile; the second tells it what it changes. Neither has a gradient: results of
inputs that require one raise when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKeySet,
    _after_ADInplaceOrView_keyset,
    _after_autograd_keyset,
    _any_requires_grad,
    _AutoDispatchBelowAutograd,
)
from torch.autograd.graph import increment_version

from anyflash.core.errors import InvalidCall, Unsupported
from anyflash.dispatch.plan import execute_forward
from anyflash.frontends.cache import CacheRequest, begin
from anyflash.frontends.torch_arrays import empty, fake_results, new_results, view
from anyflash.frontends.torch_op import LIBRARY

_REST = (
    "Tensor?[] integers, Tensor[] tables, Tensor? sinks, Tensor? cos, Tensor? sin, bool interleaved, "
    "str[] names, str program, str layout, str? backend) -> (Tensor out, Tensor lse)"
)
_SCHEMAS = {
    "attention_kvcache": "(Tensor q, Tensor cache_k, Tensor cache_v, ",
    "attention_kvcache_append": "(Tensor q, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor k, Tensor v, ",
}


def _append_kernel(q: Tensor, cache_k: Tensor, cache_v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    k, v, integers, tables, sinks, cos, sin, interleaved, names, program, layout, backend = rest
    rotary = None if cos is None else (cos, sin)
    made, operands = begin(
        view,
        empty,
        CacheRequest(
            program, q, cache_k, cache_v, k, v, integers, rotary, interleaved, layout, tables, names, sinks,
            backend,
        ),
    )  # fmt: skip
    (out, lse, _), results = new_results(layout, q, cache_v)
    execute_forward(made, operands, results)
    return out, lse


def _read_kernel(q: Tensor, cache_k: Tensor, cache_v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _append_kernel(q, cache_k, cache_v, None, None, *rest)


def _fake(q: Tensor, cache_k: Tensor, cache_v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    for argument, tensor in (("cache.k", cache_k), ("cache.v", cache_v)):
        if tensor.device != q.device:
            expected = f"{q.device}, the device of q"
            raise InvalidCall(argument, f"on device {tensor.device}", expected)
    layout = rest[-2]
    out, lse, _ = fake_results(layout, q, cache_v)
    return out, lse


class _WithoutGradient(torch.autograd.Function):
    """The call, whose results remember that their gradient was not computed."""

    @staticmethod
    def forward(ctx: Any, op: Any, keyset: DispatchKeySet, args: tuple[Any, ...], *flat: Any) -> Any:
        return _below(op, keyset, args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise Unsupported(
            "the gradient of attention over a KV cache",
            {"torch": ["a cache is for inference: its calls keep nothing for a backward"]},
            "anyflash.attention and anyflash.attention_varlen have gradients",
        )


def _below(op: Any, keyset: DispatchKeySet, args: Sequence[Any]) -> Any:
    with _AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _after_autograd_keyset, *args)


def _register(name: str, kernel: Any) -> Any:
    LIBRARY.define(name + _SCHEMAS[name] + _REST, tags=(torch.Tag.needs_exact_strides,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"anyflash::{name}", _fake, lib=LIBRARY)
    op = getattr(torch.ops.anyflash, name).default
    appends = op._schema.is_mutable

    def autograd(keyset: DispatchKeySet, *args: Any) -> Any:
        if not torch.is_grad_enabled() or not _any_requires_grad(*args):
            return _below(op, keyset, args)
        if appends and (args[1].requires_grad or args[2].requires_grad):
            raise Unsupported(
                "appending to a KV cache that requires a gradient",
                {"torch": ["a cache is written in place"]},
                "Call it under torch.no_grad, or detach the cache",
            )
        flat = [tensor for arg in args for tensor in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        return _WithoutGradient.apply(op, keyset, args, *flat)

    def in_place(keyset: DispatchKeySet, *args: Any) -> Any:
        increment_version(args[1:3])
        return op.redispatch(keyset & _after_ADInplaceOrView_keyset, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    if appends:
        LIBRARY.impl(name, in_place, "ADInplaceOrView", with_keyset=True)
    return op


_READ = _register("attention_kvcache", _read_kernel)
_APPEND = _register("attention_kvcache_append", _append_kernel)


def attend(request: CacheRequest) -> tuple[Tensor, Tensor]:
    """(out, lse) of the request, through torch's dispatcher."""
    cos, sin = request.rotary or (None, None)
    rest = (
        list(request.integers), list(request.tables), request.sinks, cos, sin, request.rotary_interleaved,
        list(request.names), request.program, request.layout, request.backend,
    )  # fmt: skip
    cache = (request.cache_k, request.cache_v)
    if request.k is None:
        return _READ(request.q, *cache, *rest)
    return _APPEND(request.q, *cache, request.k, request.v, *rest)
