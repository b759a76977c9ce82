"""What dispatch says of a call over a cache: lengths, tiles, operations, bytes."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.core.device import CPU
from anyflash.dispatch.choose import summary
from anyflash.dispatch.explain import explain
from anyflash.frontends.numpy_ import FRONTEND
from anyflash.semantics.addressing import sequence_lengths
from anyflash.semantics.cache import Integers, describe_cache
from anyflash.semantics.cost import cost
from anyflash.semantics.keywords import describe_program
from anyflash.semantics.problem import Program

HQ, HK, D, DV = 4, 2, 8, 6
view = FRONTEND.view


def described(packed: bool):
    k, v = (np.zeros((20, 16, HK, d), np.float32) for d in (D, DV))
    q = np.zeros((5, HQ, D) if packed else (2, 3, HQ, D), np.float32)
    integers = Integers(
        cu_seqlens_q=view(np.array([0, 1, 5])) if packed else None,
        seqlens=view(np.array([70, 9])),
        block_table=view(np.arange(10, dtype=np.int32).reshape(2, 5)),
        leftpad=view(np.array([10, 0])),
    )
    layout = "thd" if packed else "bshd"
    program = describe_program(
        q.shape, None, lambda _, a: a.dtype.name, layout=layout, sequences=2 if packed else None, causal=True
    ).program
    made = describe_cache(program, view(q), view(k), view(v), integers=integers, layout=layout)
    return made.problem, made.operands


@pytest.mark.parametrize("packed", [False, True])
def test_cost(packed):
    problem, operands = described(packed)
    q_lens, k_lens = sequence_lengths(problem, operands)
    assert q_lens.tolist() == ([1, 4] if packed else [3, 3])
    assert k_lens.tolist() == [60, 9]
    assert problem.seqlen_k == 64
    assert operands.longest_k == 60
    found = explain(problem, operands, "reference")
    pairs = sum(int(q) * int(k) for q, k in zip(q_lens, k_lens, strict=True)) * HQ
    exact = cost(problem, 1.0, list(zip(q_lens.tolist(), k_lens.tolist(), strict=True)))
    assert exact.pairs == pairs
    assert exact.pairs <= cost(problem).pairs
    keys, rows = 69 * HK * (D + DV) * 4, int(q_lens.sum()) * HQ
    assert exact.bytes_forward == keys + rows * (D + DV) * 4 + 3 * rows * 4
    assert found.cost.bytes_forward == exact.bytes_forward
    assert found.tiles is not None
    assert found.tiles.total == 2 * HQ
    assert "2 sequences in a cache, longest" in summary(problem, CPU)
    assert str(found).startswith("attention of q")


def test_lengths_of_a_step_are_one_problem():
    """Steps of a decoding differ in lengths, and ask the same question until a power of two is passed."""
    k = np.zeros((2, 300, HK, D), np.float32)
    q = np.zeros((2, 1, HQ, D), np.float32)
    problems = [
        describe_cache(
            Program(), view(q), view(k), view(k), integers=Integers(seqlens=view(np.full(2, n)))
        ).problem
        for n in range(1, 300)
    ]
    assert len(set(problems)) == len({1 << (n - 1).bit_length() for n in range(1, 300)})
