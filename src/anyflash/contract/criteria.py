"""How far a result may be from the truth. No number here depends on a measurement made by hand.

The bound is FACTOR times the error of plain attention in the same dtype, the worst of several orders of its
sums, plus a floor: one unit in the last place of the result, where a result smaller than the outputs of
attention commonly are counts as one of that size, and lse as at least 1, since the sum under its logarithm is
at least 1 and rounded. It holds for the greatest error and for the root mean square. Where the truth is NaN
or infinite the result must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
OUTPUT_SIZE = 0.3
LSE_SIZE = 1.0

Norm = Callable[[np.ndarray], float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ratio` is the error over its bound, the worse of maximum and root mean square; above 1 fails."""

    name: str
    ratio: float
    complaint: str | None = None


def judge(
    name: str,
    got: np.ndarray,
    truth: np.ndarray,
    plains: Sequence[np.ndarray],
    factor: float,
    least: float = OUTPUT_SIZE,
) -> Verdict:
    """`got` in its own dtype; `truth` and `plains` in wider ones. `least` as in the module's docstring."""
    if got.shape != truth.shape:
        return Verdict(name, np.inf, f"{name}: shape {got.shape}, expected {truth.shape}")
    if not got.size:
        return Verdict(name, 0.0)
    with np.errstate(all="ignore"):
        rounded = truth.astype(got.dtype).astype(truth.dtype)
        wide = got.astype(truth.dtype)
        wrong = _special(wide) != _special(rounded)
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            return Verdict(
                name,
                np.inf,
                f"{name}: {int(wrong.sum())} of {got.size} elements differ in being finite, infinite or NaN; "
                f"element {first} is {wide[first]}, expected {rounded[first]}",
            )
        finite = np.isfinite(rounded)
        error = np.where(finite, np.abs(wide - truth), 0).astype(np.float64)
        allowed_max, allowed_rms = (
            factor * _worst(plains, truth, finite, norm) + _floor(truth, got.dtype, finite, least, norm)
            for norm in (_greatest, _rms)
        )
    greatest, typical = float(error.max()), float(_rms(error))
    ratio = max(_over(greatest, allowed_max), _over(typical, allowed_rms))
    if ratio <= 1:
        return Verdict(name, ratio)
    worst = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    return Verdict(
        name,
        ratio,
        f"{name}: greatest error {greatest:.3g} (allowed {allowed_max:.3g}), rms {typical:.3g} "
        f"(allowed {allowed_rms:.3g}); element {worst} is {wide[worst]:.9g}, expected {truth[worst]:.9g}",
    )


def _special(x: np.ndarray) -> np.ndarray:
    """0 finite, 1 NaN, 2 and 3 the infinities"""
    return np.where(np.isnan(x), 1, np.where(np.isinf(x), np.where(x > 0, 2, 3), 0))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _greatest(x: np.ndarray) -> float:
    return float(np.max(x))


def _worst(plains: Sequence[np.ndarray], truth: np.ndarray, finite: np.ndarray, norm: Norm) -> float:
    """The greatest error of the plain results; what overflowed in one of them says nothing."""
    worst = 0.0
    for plain in plains:
        error = np.abs(plain.astype(truth.dtype) - truth)
        usable = finite & np.isfinite(error)
        worst = max(worst, norm(np.where(usable, error, 0).astype(np.float64)))
    return worst


def _floor(truth: np.ndarray, dtype: np.dtype, finite: np.ndarray, least: float, norm: Norm) -> float:
    """One unit in the last place of the results."""
    size = np.where(finite, np.abs(truth) + least, least)
    return norm(np.spacing(size.astype(dtype)).astype(np.float64))


def _over(error: float, allowed: float) -> float:
    return error / allowed if allowed else (0.0 if error == 0 else np.inf)
