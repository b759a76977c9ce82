"""Loss curves: the same training, from the same weights on the same text, under each attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from anyflash.adoption.row import Role, Workload

# The part of what training gained by which two curves may part. Rounding alone parts them: each step
# amplifies what the one before it differed by.
ALLOWED = 0.01


def train(workload: Workload, steps: int, done: Callable[[float], None]) -> dict[str, Any]:
    """`losses` by role, the greatest difference of ours from eager, and what training gained.

    Raises RuntimeError if a loss is not finite, if nothing was learned, or if ours leaves eager's curve by
    more than a hundredth of what was gained.
    """
    assert workload.train is not None
    losses: dict[Role, list[float]] = {}
    for i, variant in enumerate(workload.variants):
        with variant.context():
            losses[variant.role] = [float(loss) for loss in workload.train(variant.role, steps)]
        done((i + 1) / len(workload.variants))
    eager, ours = losses["eager"], losses["ours"]
    gained = eager[0] - min(eager)
    difference = max(abs(a - b) for a, b in zip(eager, ours, strict=True))
    if not all(math.isfinite(loss) for curve in losses.values() for loss in curve):
        raise RuntimeError("a loss is not finite: " + ", ".join(f"{r} {c[-1]:g}" for r, c in losses.items()))
    if gained <= 0:
        raise RuntimeError(
            f"eager attention learned nothing in {steps} steps: its loss began at {eager[0]:.4g}"
        )
    if difference > ALLOWED * gained:
        raise RuntimeError(
            f"our loss leaves eager's by {difference:.2e} in {steps} steps, "
            f"and training gained {gained:.3g}: more than {ALLOWED:g} of it"
        )
    return {"losses": losses, "difference": difference, "gained": gained}


def sentence(curve: dict[str, Any]) -> str:
    steps = len(curve["losses"]["ours"])
    return (
        f"loss of {steps} training steps from the same weights: ours differs from eager by at most "
        f"{curve['difference']:.1e}, of {curve['gained']:.3g} gained"
    )
