"""Operations and bytes of small problems, counted by hand."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest

from anyflash.semantics import cost as module
from anyflash.semantics.cost import cost, scratch_bound
from anyflash.semantics.problem import Problem, Program, TableSpec

DENSE = Problem(Program(), "bfloat16", 2, 6, 3, 5, 7, 4, 8)
PACKED = replace(DENSE, addressing="varlen", total_q=9, total_k=11)


def test_operations():
    found = cost(DENSE)
    assert found.pairs == 2 * 6 * 5 * 7
    assert found.flops_forward == found.pairs * (2 * 4 + 2 * 8)
    assert found.flops_backward == found.pairs * (3 * 2 * 4 + 2 * 2 * 8)
    assert cost(DENSE, allowed=0.25).flops_forward == found.flops_forward / 4


def test_packed_pairs():
    lengths = [(5, 4), (4, 7)]
    exact = cost(PACKED, lengths=lengths)
    assert exact.pairs == 6 * (5 * 4 + 4 * 7)
    assert exact.pairs <= cost(PACKED).pairs


def test_bytes():
    problem = replace(DENSE, tables=(TableSpec("float32", (6, 5, 7), True), TableSpec("int64", (7,))))
    q, k, v, out = 2 * 5 * 6 * 4 * 2, 2 * 7 * 3 * 4 * 2, 2 * 7 * 3 * 8 * 2, 2 * 5 * 6 * 8 * 2
    lse, bias, ids = 2 * 6 * 5 * 4, 6 * 5 * 7 * 4, 7 * 8
    found = cost(problem)
    assert found.bytes_forward == q + k + v + bias + ids + out + lse + 2 * lse
    assert found.bytes_backward == (q + k + v) + (bias + ids) + 2 * out + 2 * lse + (q + k + v) + bias


@pytest.mark.parametrize("backward", [False, True])
def test_scratch_grows_linearly(backward):
    def bound(n):
        return scratch_bound(replace(DENSE, seqlen_q=n, seqlen_k=n), 4, 64, 64, backward)

    assert bound(4000) - bound(3000) == bound(3000) - bound(2000)


def test_examples():
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
