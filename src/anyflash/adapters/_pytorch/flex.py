"""FlexAttention's call, with its gradients, where torch has them on a GPU only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyflash import api
from anyflash.adapters._torch.symbols import NotTraceable, trace, trace_mask
from anyflash.core.errors import InvalidCall, Unsupported
from anyflash.semantics.expr import At, Expr

Mod = Callable[..., Any]


@torch.compiler.disable
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Any:
    """`torch.nn.attention.flex_attention.flex_attention`, with gradients on the CPU.

    Args:
        query: (B, Hq, Tq, D).
        key: (B, Hkv, Tk, D); Hkv may be a divisor of Hq with `enable_gqa`. B may be 1 in key and value.
        value: (B, Hkv, Tk, Dv).
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)` gives the new score. It is called once, with
            symbols that stand for the five tensors: arithmetic, comparisons, `&`, `|`, `~`, torch.where, abs,
            exp, log, tanh, sigmoid, minimum, maximum, casts, and lookups of tensors, `slopes[h]`. Tensors
            that are looked up get a gradient if they require one.
        block_mask: what torch's `create_block_mask` gives. Its `mask_mod` is compiled into the kernel, which
            finds the empty blocks by itself; the blocks listed in it are not read.
        scale: of the products; None is D ** -0.5.
        enable_gqa: let key and value have fewer heads than query.
        return_lse: give (out, lse), lse (B, Hq, Tq), the natural logarithm.
        kernel_options: for torch's kernels; not looked at.
        return_aux: torch's `AuxRequest`: give (out, AuxOutput). The greatest scores are not among what can be
            asked for.

    Returns:
        out (B, Hq, Tq, Dv), or as said. A query that sees no key gets 0, and lse -inf.

    Raises:
        InvalidCall: shapes do not go together.
        Unsupported: a function does what has no symbol; the message says what. Or `max_scores` was asked for.

    Inside torch.compile a call is a break of the graph: torch's own, or `anyflash.attention` with `score` and
    `mask`, are one node of it.

    Example:
        >>> import torch
        >>> from anyflash.torch import flex_attention
        >>> q = torch.randn(1, 2, 16, 8, requires_grad=True)
        >>> slopes = torch.tensor([0.5, 0.25], requires_grad=True)
        >>> out = flex_attention(q, q, q, lambda score, b, h, i, j: score - slopes[h] * (i - j).abs())
        >>> out.sum().backward()
        >>> slopes.grad.shape
        torch.Size([2])
    """
    if getattr(return_aux, "max_scores", False):
        raise Unsupported("flex_attention", {"anyflash": ["the greatest score of a row is not kept"]})
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise InvalidCall(
            "key",
            f"{key.shape[1]} heads",
            f"{query.shape[1]}, those of query",
            "enable_gqa=True lets them differ",
        )
    if key.shape[0] != query.shape[0]:
        key, value = (t.expand(query.shape[0], -1, -1, -1) for t in (key, value))
    out, lse = api.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scale,
        score=None
        if score_mod is None
        else lambda s, at: _traced("score_mod", trace, score_mod, s, *_indices(at)),
        mask=_mask(block_mask),
        return_lse=True,
    )
    out = out.transpose(1, 2)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def _mask(block_mask: Any) -> Any:
    if block_mask is None:
        return None
    return lambda at: _traced("block_mask", trace_mask, block_mask.mask_mod, *_indices(at))


def _indices(at: At) -> tuple[Expr, Expr, Expr, Expr]:
    """FlexAttention counts queries from 0."""
    return at.batch, at.head, at.row, at.k


def _traced(argument: str, tracer: Callable[..., Expr], function: Mod, *arguments: Expr) -> Expr:
    try:
        return tracer(function, *arguments)
    except NotTraceable as reason:
        raise Unsupported(
            f"flex_attention with this {argument}",
            {"anyflash": [str(reason)]},
            "anyflash.attention takes such functions in its own terms, as score= and mask=",
        ) from reason
