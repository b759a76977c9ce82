"""Small calls that the property tests share."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyflash.contract.backends import WITHIN_BOUNDS, present
from anyflash.contract.direct import Outcome, attend
from anyflash.contract.poison import numpy_dtype
from anyflash.semantics import expr
from anyflash.semantics.expr import Table

BITWISE = [name for name in present() if name not in WITHIN_BOUNDS]
"""Backends that promise the same bits whatever the batch, the layout and the number of threads."""

PROGRAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window_softcap": {"window": (20, 3), "softcap": 3.0},
    "function": {
        "score": lambda s, at: s - expr.log(1 + abs(at.q - at.k)) / (1 + at.head),
        "mask": lambda at: (at.k % 5 != 1) & (at.k <= at.q + 7),
    },
    "slopes": {"score": lambda s, at: s - SLOPES[at.head] * abs(at.q - at.k), "causal": True},
}
SLOPES = Table(np.array([0.1, 0.2, 0.3, 0.4], np.float32), "float")


def operands(
    dtype: str, lead_q: tuple[int, ...], lead_k: tuple[int, ...], dim: int = 24, seed: int = 0
) -> dict[str, np.ndarray]:
    """q, k, v, dout, dlse with 4 query and 2 key heads, in canonical axes."""
    rng = np.random.default_rng(seed)
    own = numpy_dtype(dtype)
    statistic = np.float64 if dtype == "float64" else np.float32
    made = {
        name: rng.standard_normal((*lead, heads, dim)).astype(own)
        for name, lead, heads in (("q", lead_q, 4), ("k", lead_k, 2), ("v", lead_k, 2), ("dout", lead_q, 4))
    }
    made["dlse"] = rng.standard_normal((*lead_q[:-1], 4, lead_q[-1])).astype(statistic)
    return made


def results(outcome: Outcome) -> dict[str, np.ndarray]:
    named = {name: getattr(outcome, name) for name in ("out", "lse", "dq", "dk", "dv", "dsinks")}
    named |= {f"table{i}": table for i, table in enumerate(outcome.tables)}
    return {name: array for name, array in named.items() if array is not None}


def run(backend: str, arrays: dict[str, np.ndarray], **keywords: Any) -> dict[str, np.ndarray]:
    return results(attend(backend, **arrays, **keywords))


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray], context: object = "") -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes(), f"{name} differs {context}"
