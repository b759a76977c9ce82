"""`flash_attn.ops.triton.cross_entropy`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyflash.compat.errors import refuse_given
from anyflash.compat.flash_attn.ops._norm import wide


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Loss of each row: lse(scaled logits) - its label's logit, and a penalty on lse.

    Args:
        logits: (batch, vocabulary), multiplied by `logit_scale`.
        labels: (batch,); rows of `ignore_index` have loss 0.
        precomputed_lse: (batch,), of the logits themselves; without smoothing and scale only.
        label_smoothing: this share of the label goes to all classes alike.
        lse_square_scale: adds this times lse squared (z-loss).
        inplace_backward: upstream then writes the gradient over the logits to save memory; the results are
            the same.

    Returns:
        (losses (batch,) in float32 or wider, penalties included; the penalties (batch,), for logging).
    """
    refuse_given("a vocabulary split over a process group is not provided", process_group=process_group)
    if precomputed_lse is not None and (label_smoothing != 0.0 or logit_scale != 1.0):
        raise ValueError("precomputed_lse goes with label_smoothing=0 and logit_scale=1")
    scaled = wide(logits) * logit_scale
    lse = scaled.logsumexp(-1) if precomputed_lse is None else _with_gradient(precomputed_lse, scaled)
    ignored = labels == ignore_index
    own = scaled.gather(-1, labels.masked_fill(ignored, 0).long()[:, None])[:, 0]
    target = own if label_smoothing == 0.0 else own + label_smoothing * (scaled.mean(-1) - own)
    penalty = lse_square_scale * lse.square()
    losses = (lse - target + penalty).masked_fill(ignored, 0)
    return losses, penalty.detach().masked_fill(ignored, 0)


def _with_gradient(lse: Tensor, logits: Tensor) -> Tensor:
    """lse as given, with the gradient that it has in the logits."""
    if not logits.requires_grad:
        return lse
    p = (logits.detach() - lse.detach()[:, None]).exp()
    through = (p * logits).sum(-1)
    return lse.detach() + through - through.detach()
