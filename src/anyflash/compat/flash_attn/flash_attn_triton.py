"""`flash_attn.flash_attn_triton`: attention with an additive bias; causal is aligned at the top left."""

from __future__ import annotations

from torch import Tensor

from anyflash.compat import calls
from anyflash.compat.calls import Terms
from anyflash.compat.flash_attn import _checks
from anyflash.semantics.mask import upper_left


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of q (B, Sq, H, D) over k, v (B, Sk, H, D) with scores scale * q . k + bias.

    bias (1 or B, 1 or H, 1 or Sq, Sk) gets a gradient where it requires one, which upstream refuses.
    """
    _checks.dense(q, k, v)
    what = Terms(scale=softmax_scale, mask=upper_left() if causal else None, bias=_floating(bias))
    return calls.attend(q, k, v, what)[0]


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """`flash_attn_func` of kv (B, Sk, 2, H, D)."""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """`flash_attn_func` of qkv (B, S, 3, H, D)."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, bias, causal, softmax_scale)


def _floating(bias: Tensor | None) -> Tensor | None:
    """Booleans never were a bias; integers are added as the numbers they are."""
    if bias is None or bias.is_floating_point() or bias.dtype.is_complex:
        return bias
    return bias.float()
