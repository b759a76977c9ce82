"""What a problem must cost: operations, memory traffic, and how much scratch memory a kernel may take."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from anyflash.core.dtypes import ITEMSIZE, accumulate
from anyflash.semantics.problem import Problem


class Cost(NamedTuple):
    """Of one call.

    pairs            (query head, query, key) triples that the mask allows
    flops_forward    two products: q . k and p . v; a multiplication and an addition each
    flops_backward   five products: the scores again, dp, dv, dq and dk
    bytes_*          each array that is read or written counted once, which no kernel can undercut
    """

    pairs: float
    flops_forward: float
    flops_backward: float
    bytes_forward: int
    bytes_backward: int


def cost(problem: Problem, allowed: float = 1.0, lengths: Sequence[tuple[int, int]] | None = None) -> Cost:
    """The cost of `problem`.

    allowed   share of the pairs that the mask leaves, 0 to 1
    lengths   (queries, keys) of each sequence of a packed call, or one over a cache; without them the
              number of pairs is an upper bound, from the longest lengths and the totals: all that is known
              of lengths on a device

    Exponentials and the program's own arithmetic are not counted, as is the custom in the field.

    >>> from anyflash.semantics.problem import Problem, Program
    >>> dense = Problem(Program(), "float32", 1, 8, 8, 2048, 2048, 64, 64)
    >>> round(cost(dense).flops_forward / 1e9, 2)
    8.59
    """
    if lengths is not None:
        area = sum(q_len * k_len for q_len, k_len in lengths)
    elif problem.addressing == "varlen":
        area = min(problem.total_q * problem.seqlen_k, problem.total_k * problem.seqlen_q)
    elif problem.packed_q:
        area = problem.total_q * problem.seqlen_k
    else:
        area = problem.batch * problem.seqlen_q * problem.seqlen_k
    pairs = area * problem.heads_q * allowed
    dim, dim_v = problem.head_dim, problem.head_dim_v
    q, k, v, out = (
        prod(shape) * ITEMSIZE[dtype]
        for shape, dtype in (
            (problem.q_shape, problem.dtype),
            (problem.k_shape, problem.dtype_kv),
            (problem.v_shape, problem.dtype_kv),
            (problem.out_shape, problem.dtype_out),
        )
    )
    if problem.addressing == "paged":
        # Of a cache, what holds keys of the call; pages that several sequences share count for each.
        keys = problem.batch * problem.seqlen_k if lengths is None else sum(n for _, n in lengths)
        heads = keys * problem.heads_kv * ITEMSIZE[problem.dtype_kv]
        k, v = heads * dim, heads * dim_v
    statistic = ITEMSIZE[accumulate(problem.dtype)]
    lse = prod(problem.lse_shape) * statistic
    tables = sum(prod(spec.shape) * ITEMSIZE[spec.dtype] for spec in problem.tables)
    dtables = sum(prod(spec.shape) * statistic for spec in problem.tables if spec.needs_grad)
    return Cost(
        pairs,
        2.0 * pairs * (dim + dim_v),
        2.0 * pairs * (3 * dim + 2 * dim_v),
        q + k + v + tables + out + 3 * lse,
        2 * (q + k + v) + tables + dtables + 2 * out + 2 * lse,
    )


def scratch_bound(problem: Problem, threads: int, block_q: int, block_k: int, backward: bool = False) -> int:
    """The most scratch bytes that a kernel may take with these tiles: linear in sequence length.

    A thread holds one tile of queries, keys, values and results, and the square of scores between them, twice
    over in the backward; keys and values may be packed once for each key head; and the backward may hold
    partial sums of dq, dk and dv for each thread, for one (batch, head). All in the accumulator's type.
    """
    width = problem.head_dim + problem.head_dim_v
    tile = (block_q + block_k) * (width + 4) + block_q * block_k
    longest = max(problem.seqlen_k, 1)
    packing = problem.batch * problem.heads_kv * longest * width
    elements = threads * tile + packing
    if backward:
        elements = 2 * elements + threads * (problem.seqlen_q + longest) * width
    return elements * ITEMSIZE[accumulate(problem.dtype)]
