"""`flash_attn.losses.cross_entropy`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from anyflash.compat.errors import refuse_given, unsupported
from anyflash.compat.flash_attn.ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(nn.Module):
    """`cross_entropy_loss` reduced: "mean" over rows that are not ignored, "sum", or "none".

    With `return_z_loss` gives (loss, penalty), the latter for logging.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise unsupported("reduction", repr(reduction), "it is mean, sum or none")
        refuse_given("a vocabulary split over a process group is not provided", process_group=process_group)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None) -> Any:
        """input (batch, vocabulary), target (batch,)."""
        loss, penalty = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
        )
        loss = self._reduced(loss, target)
        return (loss, self._reduced(penalty, target)) if self.return_z_loss else loss

    def _reduced(self, rows: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return rows
        total = rows.sum()
        return total / (target != self.ignore_index).sum() if self.reduction == "mean" else total
