"""Partial results and how they combine.

Attention over some of the keys gives (out, lse), lse being the logarithm of the sum of exp(score). Two such
results over disjoint keys combine exactly:

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

This is associative and commutative up to rounding, and (0, -inf), the result over no keys, is its neutral
element.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def merge(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, layout: str = "bshd"
) -> tuple[Array, Array]:
    """Combine partial results over disjoint keys into (out, lse).

    out_*   (batch, q, heads, dim) in layout "bshd", (batch, heads, q, dim) in "bhsd", (total, heads, dim) in
    "thd" lse_*   (batch, heads, q), or (heads, total) in "thd"; natural logarithm

    out has the dtype of `out_a`, lse that of `lse_a`; sums are in the latter. What `out` holds in a row whose
    lse is -inf is not looked at.

    >>> import numpy as np
    >>> out, lse = merge(np.full((1, 1, 1, 1), 2.0), np.zeros((1, 1, 1)),
    ...                  np.full((1, 1, 1, 1), 4.0), np.zeros((1, 1, 1)))
    >>> out.item(), round(lse.item(), 4)
    (3.0, 0.6931)
    """
    lse = np.logaddexp(lse_a, lse_b)
    total = np.zeros((), lse.dtype)
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        with np.errstate(invalid="ignore"):
            share = along_out(np.exp(part - lse), layout)
            total = total + np.where(along_out(part, layout) == -np.inf, 0, share * out.astype(lse.dtype))
    return total.astype(out_a.dtype), lse.astype(lse_a.dtype)


def along_out(lse: Array, layout: str) -> Array:
    """A view of lse that broadcasts against out in `layout`."""
    return (lse if layout == "bhsd" else np.swapaxes(lse, -1, -2))[..., None]
