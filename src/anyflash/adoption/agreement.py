"""Is what a system computes with our attention as right as with its own?

Every variant is compared with the same step in float64. Ours may err at most twice as much as the worse of
the system's own attentions, three times for gradients, plus one rounding of the dtype: the bounds follow from
what the system itself does, none is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from anyflash.adoption.row import Arrays, Result, Role

FACTORS = {"outputs": 2.0, "gradients": 3.0}
_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of outputs or of gradients.

    errors      per role: root mean square of the difference from float64, relative to that of float64
    allowed     what ours may have
    difference  greatest |ours - eager|
    of          greatest |eager|, for scale
    """

    kind: str
    errors: dict[str, float]
    allowed: float
    difference: float
    of: float

    @property
    def holds(self) -> bool:
        return self.errors["ours"] <= self.allowed


def compare(reference: Result, results: Mapping[Role, Result], dtype: str) -> list[Agreement]:
    """One Agreement for the outputs, and one for the gradients if the step has any."""
    found: list[Agreement] = []
    for kind, factor in FACTORS.items():
        exact: Arrays = getattr(reference, kind)
        if not exact:
            continue
        arrays: dict[Role, Arrays] = {role: getattr(result, kind) for role, result in results.items()}
        errors = {str(role): _relative_error(exact, given) for role, given in arrays.items()}
        own = max(error for role, error in errors.items() if role != "ours")
        difference, of = _greatest_difference(arrays["ours"], arrays["eager"])
        found.append(Agreement(kind, errors, factor * own + _EPSILON[dtype], difference, of))
    return found


def _relative_error(exact: Arrays, given: Arrays) -> float:
    """Over all arrays together; NaN if any element is."""
    if exact.keys() != given.keys():
        raise ValueError(f"results differ in their names: {sorted(exact.keys() ^ given.keys())}")
    difference = total = 0.0
    for name, a in exact.items():
        wide = np.asarray(a, np.float64)
        difference += float(np.sum((np.asarray(given[name], np.float64) - wide) ** 2))
        total += float(np.sum(wide**2))
    return (difference / total) ** 0.5 if total else difference**0.5


def _greatest_difference(ours: Arrays, eager: Arrays) -> tuple[float, float]:
    difference = of = 0.0
    for name, a in eager.items():
        wide = np.asarray(a, np.float64)
        difference = max(difference, float(np.abs(np.asarray(ours[name], np.float64) - wide).max()))
        of = max(of, float(np.abs(wide).max()))
    return difference, of
