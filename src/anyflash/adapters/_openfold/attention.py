"""OpenFold's attention over any leading axes, with biases that each leave out some.

query       (*, heads, q, dim), scaled already; key, value (*, heads, k, dim)
biases      each broadcasts to (*, heads, q, k): of alignments a mask (1, rows, 1, 1, k), 0 or -1e9, and a
            pair bias (1, 1, heads, q, k), with gradients
result      (*, heads, q, dim)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from anyflash.adapters._torch.leading import attend


def attention_for_openfold(query: Tensor, key: Tensor, value: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """In the place of `openfold.model.primitives._attention`."""
    return attend(query, key, value, biases, 1.0)
