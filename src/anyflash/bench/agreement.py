"""Does a result agree with float64, closely enough to be timed?

The bound follows from the cell itself, without a figure chosen by hand:

    factor * (error of plain attention in the same dtype, on the same inputs)
    + size * (rounding of the dtype + sqrt(terms) * rounding of the accumulator)

`terms` are those of the longest sum: n roundings of either sign add up to about sqrt(n) of them, and plain
attention, whose matrix products sum in a tree, has fewer. The bound holds for the greatest error, with the
size of the greatest value, and for root mean squares.

A peer is only asked whether it computes the same thing: PEER_SLACK times as much is allowed, so that one
which rounds more often than plain attention does is still something to be compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflash.bench.inputs import Results

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
PEER_SLACK = 10.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`error` is the root mean square of the difference relative to that of the truth, of the worst array.

    `ratio` is the greatest error over its bound. `complaint` says why a result is refused; None if it is not.
    """

    error: float
    ratio: float
    complaint: str | None

    @property
    def agrees(self) -> bool:
        return self.complaint is None


@dataclass(frozen=True, slots=True)
class Expected:
    """`truth` in float64, `plain` in the accumulator's dtype, and the terms of the longest sum."""

    truth: Results
    plain: Results
    terms: int


def judge(got: Results, expected: Expected, slack: float = 1.0) -> Verdict:
    """`got` in the cell's dtype; gradients of biases may be wider. Bounds are `slack` times as wide; the
    verdict's ratio is to the bound without it."""
    truth = expected.truth
    if got.keys() != truth.keys():
        return Verdict(torch.inf, torch.inf, f"gives {', '.join(got)}; expected {', '.join(truth)}")
    verdicts = [_judge(name, got[name], expected, slack) for name in truth]
    worst = max(verdicts, key=lambda verdict: verdict.ratio)
    return Verdict(max(verdict.error for verdict in verdicts), worst.ratio, worst.complaint)


def _judge(name: str, got: Tensor, expected: Expected, slack: float) -> Verdict:
    truth, plain = expected.truth[name], expected.plain[name]
    if got.shape != truth.shape:
        return Verdict(
            torch.inf, torch.inf, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        )
    if not torch.isfinite(got).all():
        return Verdict(
            torch.inf, torch.inf, f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
        )
    factor = OUTPUT_FACTOR if name == "out" else GRADIENT_FACTOR
    rounding = _rounding(got.dtype) + math.sqrt(expected.terms) * _rounding(plain.dtype)
    error, own = (got.double() - truth).abs(), (plain.double() - truth).abs()
    size = _rms(truth)
    ratios = {
        "greatest error": (
            float(error.max()),
            factor * float(own.max()) + rounding * float(truth.abs().max()),
        ),
        "root mean square error": (_rms(error), factor * _rms(own) + rounding * size),
    }
    kind, (value, bound) = max(ratios.items(), key=lambda item: item[1][0] / (item[1][1] or 1.0))
    ratio = value / bound if bound else (torch.inf if value else 0.0)
    complaint = None if ratio <= slack else f"{name}: {kind} {value:.2e}, allowed {slack * bound:.2e}"
    return Verdict(_rms(error) / size if size else _rms(error), ratio, complaint)


def _rounding(dtype: torch.dtype) -> float:
    """The greatest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
