"""Rows behind the last sequence of a packed array kept whatever the memory held (fla PR 892;
ROCm/flash-attention PR 175). They are written: out 0, lse -inf, gradients 0.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.cases import Case, Packed
from anyflash.contract.memory import Memory
from anyflash.contract.rules import Causal
from anyflash.contract.run import execute
from anyflash.contract.values import draw

PACKED = {
    "some": Packed((10, 20), (10, 30), slack_q=7, slack_k=9),
    "queries_only": Packed((10, 20), (10, 30), slack_q=100),
    "keys_only": Packed((10, 20), (10, 30), slack_k=200),
    "unused_keys": Packed((10, 20), (30, 90), used_k=(12, 0), slack_q=3),
    "no_sequence": Packed((), (), slack_q=4, slack_k=5),
    "empty_sequences": Packed((0, 0), (0, 0), slack_q=4, slack_k=5),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", present())
def test_they_are_zero(backend, dtype, name):
    packed = PACKED[name]
    case = Case(name, dtype=dtype, packed=packed, rules=(Causal(),), sinks="randn")
    memory = Memory(case, draw(case))
    found = execute(memory, backend)
    assert not memory.damage()
    behind_q, behind_k = sum(packed.lens_q), sum(packed.lens_k)
    assert (found["out"][behind_q:] == 0).all()
    assert (found["dq"][behind_q:] == 0).all()
    assert (found["lse"][:, behind_q:] == -np.inf).all()
    used = np.zeros(behind_k + packed.slack_k, bool)
    starts = np.cumsum((0, *packed.lens_k))
    for start, count in zip(starts, packed.used_k or packed.lens_k, strict=False):
        used[start : start + count] = True
    assert (found["dk"][~used] == 0).all()
    assert (found["dv"][~used] == 0).all()
