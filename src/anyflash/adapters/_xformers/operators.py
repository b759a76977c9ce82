"""The operators that xformers' `memory_efficient_attention` runs.

query, key, value  (B, M, H, K), or (B, M, G, H, K): G groups whose keys are the same for their H heads
lse                (B, H, M) or (B, G, H, M); with packed sequences B is 1 and M counts all of their rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from xformers.ops.fmha.common import (
    AttentionBwOpBase,
    AttentionFwOpBase,
    Context,
    Gradients,
    Inputs,
)

from anyflash.adapters._xformers.biases import TYPES, Meaning, meaning
from anyflash.core.errors import Unsupported
from anyflash.frontends import torch_explicit as explicit

_MAX_HEAD_DIM = 576


class _Capabilities:
    OPERATOR = staticmethod(explicit.forward)
    SUPPORTED_DEVICES = frozenset({"cpu"})
    SUPPORTED_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    SUPPORTED_MAX_K = _MAX_HEAD_DIM
    SUPPORTED_MIN_K = 1
    SUPPORTED_ATTN_BIAS_TYPES = TYPES
    SUPPORTS_DROPOUT = True
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_DIFFERENT_VALUE_EMBED = True
    SUPPORTS_OUTPUT_DTYPE = True
    SUPPORTS_PARTIAL = True
    SUPPORTS_BMGHK = True
    IS_DETERMINISTIC = True
    VARLEN_LSE_PACKED = True

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        """Those of xformers, but bfloat16 needs no GPU here."""
        reasons = super().not_supported_reasons(d)  # type: ignore[misc]
        return [reason for reason in reasons if not reason.startswith("bf16 is only supported")]


class FwOp(_Capabilities, AttentionFwOpBase):
    NAME = "anyflashF"

    @classmethod
    def apply(cls, inp: Inputs, needs_gradient: bool) -> tuple[Tensor, Context | None]:
        what = meaning(inp.attn_bias)
        inner = getattr(inp.attn_bias, "_bias", None)
        if needs_gradient and inner is not None and inner.requires_grad:
            raise Unsupported(
                "a gradient of the bias in LowerTriangularMaskWithTensorBias",
                {"xformers": ["it hands no gradient to a bias that is not a tensor itself"]},
                "Pass a tensor as attn_bias, with -inf above the diagonal",
            )
        seed = explicit.draw_seed() if inp.p else None
        q, k, v = _arrays(inp, what, shared=True)
        out, lse, _ = explicit.forward(q, k, v, **_call(inp, what, seed), bias=_listed(what) or None)
        groups = inp.query.shape[2:-1]
        out = _batched(out, what).unflatten(2, groups).to(inp.get_output_dtype())
        lse = (lse[None] if what.lengths is not None else lse).unflatten(1, groups)
        if not needs_gradient and not inp.is_partial:
            return out, None
        return out, Context(lse=lse, out=out, op_bw=BwOp if inp.p else None, rng_state=seed)


class BwOp(_Capabilities, AttentionBwOpBase):
    NAME = "anyflashB"
    SUPPORTS_ATTN_BIAS_GRAD = True
    # xformers itself stops at five axes on the way to an operator.
    SUPPORTS_BMGHK = False

    @classmethod
    def apply(cls, ctx: Context, inp: Inputs, grad: Tensor) -> Gradients:
        what = meaning(inp.attn_bias)
        arrays = _arrays(inp, what, shared=False)
        dout, out = (_packed(t.flatten(2, -2).to(inp.query.dtype), what) for t in (grad, ctx.out))
        # xformers may hold more columns of lse than there are rows.
        lse = ctx.lse.flatten(1, -2)[..., : inp.query.shape[1]]
        wanted = isinstance(inp.attn_bias, Tensor) and inp.attn_bias.requires_grad
        found = explicit.backward(
            dout,
            *arrays,
            out,
            lse if what.lengths is None else lse[0],
            bias=_listed(what),
            wanted=[wanted],
            **_call(inp, what, ctx.rng_state),
        )
        dk, dv = (_scattered(g, t, what) for g, t in ((found.dk, inp.key), (found.dv, inp.value)))
        db = None
        if wanted:
            assert found.biases[0] is not None
            db = found.biases[0].to(inp.attn_bias.dtype).reshape(inp.attn_bias.shape)
        return Gradients(_batched(found.dq, what).reshape(inp.query.shape), dk, dv, db)


def _call(inp: Inputs, what: Meaning, seed: Any) -> dict[str, Any]:
    return {
        **what.keywords,
        "scale": inp.scale_float,
        "dropout_p": float(inp.p),
        "lengths": what.lengths,
        "seed": seed,
    }


def _listed(what: Meaning) -> list[Tensor]:
    return [] if what.bias is None else [what.bias]


def _arrays(inp: Inputs, what: Meaning, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with one axis of heads, packed and gathered. `shared`: heads whose keys are one array in memory
    are given as one, so that it is read once; their gradients would have to be told apart again."""
    q = inp.query.flatten(2, -2)
    keys, values = inp.key, inp.value
    if shared and keys.stride(-2) == 0 and values.stride(-2) == 0:
        keys, values = keys[..., :1, :], values[..., :1, :]
    k, v = (_packed(t.flatten(2, -2), what) for t in (keys, values))
    if what.keys is not None:
        k, v = k[what.keys], v[what.keys]
    return _packed(q, what), k, v


def _packed(t: Tensor, what: Meaning) -> Tensor:
    """(1, total, H, K) without its first axis, where sequences are packed."""
    return t if what.lengths is None else t[0]


def _batched(t: Tensor, what: Meaning) -> Tensor:
    return t if what.lengths is None else t[None]


def _scattered(gradient: Tensor, like: Tensor, what: Meaning) -> Tensor:
    """The gradient of gathered rows, at their places and in the shape of `like`."""
    if what.keys is not None:
        spread = gradient.new_zeros((like.shape[1], *gradient.shape[1:]))
        gradient = spread.index_add_(0, what.keys, gradient)
    return _batched(gradient, what).reshape(like.shape)
