"""The definition of attention, forward and backward, in float64 numpy. Exact, slow, quadratic in memory.

For one sequence and one query head, with rows i and keys j:

    s_ij = program(scale q_i . k_j)              the score program at (batch, head, i, j)
    seen = mask_ij and s_ij != -inf              what is not seen takes no part, whatever memory holds there
    lse_i = log(sum_j exp(s_ij) + exp(sink))
    p_ij = exp(s_ij - lse_i)
    out_i = sum_j p_ij z_ij v_j                  z: dropout, 0 or 1 / (1 - dropout_p)

and backward, with D_i the part of the change that the normalisation takes back:

    dv_j = sum_i p_ij z_ij dout_i
    dp_ij = z_ij dout_i . v_j
    D_i = sum_j p_ij dp_ij
    ds_ij = p_ij (dp_ij - D_i + dlse_i)          for the final score, and
    dsink = sum_i exp(sink - lse_i) (dlse_i - D_i)
    dq_i = scale sum_j ds_ij program'_ij k_j
    dk_j = scale sum_i ds_ij program'_ij q_i
    dtable[index_ij] += ds_ij dprogram_ij/dload

A row that sees no key and has no sink gets out 0, lse -inf and gradients 0. The row's maximum m and the
logarithm of its sum, relative to m, are kept apart (`stats`), because lse = m + log(sum) rounds where m is
huge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyflash.semantics import rng
from anyflash.semantics.derivative import derivative, table_derivatives
from anyflash.semantics.evaluate import clamped, evaluate
from anyflash.semantics.problem import Problem
from anyflash.semantics.text import parse

Array = NDArray[Any]


class Reference(NamedTuple):
    """float64: out (.., heads, head_dim_v); lse (batch, heads, q) or (heads, total); stats (2, ..lse)."""

    out: Array
    lse: Array
    stats: Array


class Gradients(NamedTuple):
    """float64, shaped as what they are the gradients of. `dtables[i]` is None where none is wanted."""

    dq: Array
    dk: Array
    dv: Array
    dtables: tuple[Array | None, ...]
    dsinks: Array | None


class _Part(NamedTuple):
    """One sequence and one query head: where its rows, its keys and its lse lie in the arrays."""

    batch: int
    head: int
    q_len: int
    k_len: int
    rows: tuple[Any, ...]
    keys: tuple[Any, ...]
    lse: tuple[Any, ...]


class _Softmax(NamedTuple):
    env: dict[str, Any]  # the variables of expressions
    seen: Array  # (rows, keys) bool
    p: Array  # (rows, keys) probabilities
    z: Array  # (rows, keys) dropout factors
    m: Array  # (rows,) maximum score
    log_sum: Array  # (rows,) log of the sum of exp(score - m)
    p_sink: Array  # (rows,) the sink's probability


@np.errstate(all="ignore")
def forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    tables: Sequence[Array] = (),
    sinks: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seqused_k: Array | None = None,
    seed: int = 0,
    block_table: Array | None = None,
    leftpad_k: Array | None = None,
) -> Reference:
    """Attention of `problem`.

    Arrays have the canonical axes: (batch, tokens, heads, dim), or (tokens, heads, dim) with cumulative
    lengths (sequences + 1,), and k and v lie in pages if there is a `block_table`: see `Operands`. They may
    have any dtype; the result is float64. Packed rows that belong to no sequence get out 0, lse -inf.
    """
    out = np.zeros(problem.out_shape)
    lse = np.full(problem.lse_shape, -np.inf)
    stats = np.stack([lse, np.zeros_like(lse)])
    for part in _parts(problem, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, leftpad_k):
        soft = _softmax(problem, part, _rows(q, part.rows), _rows(k, part.keys), tables, sinks, seed)
        out[part.rows] = _weighted_sum(soft.p * soft.z, soft.seen, _rows(v, part.keys))
        if problem.program.factor is not None:
            out[part.rows] *= evaluate(parse(problem.program.factor), soft.env, tables)
        lse[part.lse] = soft.m + soft.log_sum
        stats[0][part.lse], stats[1][part.lse] = soft.m, soft.log_sum
    return Reference(out, lse, stats)


@np.errstate(all="ignore")
def backward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    tables: Sequence[Array] = (),
    sinks: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    seqused_k: Array | None = None,
    seed: int = 0,
    dout: Array | None = None,
    dlse: Array | None = None,
) -> Gradients:
    """Gradients of sum(out * dout) + sum(lse * dlse).

    The inputs are those of `forward`. `dout` and `dlse` are shaped as out and lse; None stands for zeros.
    """
    score = parse(problem.program.score or "score")
    slope = derivative(score)
    dq, dk, dv = np.zeros(problem.q_shape), np.zeros(problem.k_shape), np.zeros(problem.v_shape)
    dtables = tuple(np.zeros(spec.shape) if spec.needs_grad else None for spec in problem.tables)
    dsinks = None if sinks is None else np.zeros(problem.heads_q)
    dout = np.zeros(problem.out_shape) if dout is None else dout
    dlse = np.zeros(problem.lse_shape) if dlse is None else dlse
    for part in _parts(problem, cu_seqlens_q, cu_seqlens_k, seqused_k):
        q_rows, k_rows, v_rows = _rows(q, part.rows), _rows(k, part.keys), _rows(v, part.keys)
        dout_rows, dlse_rows = _rows(dout, part.rows), np.asarray(dlse[part.lse], np.float64)
        soft = _softmax(problem, part, q_rows, k_rows, tables, sinks, seed)
        dp = np.where(soft.seen, soft.z * (dout_rows @ v_rows.T), 0.0)
        delta = (soft.p * dp).sum(axis=1)
        ds = np.where(soft.seen, soft.p * (dp - delta[:, None] + dlse_rows[:, None]), 0.0)

        dv[part.keys] += _weighted_sum((soft.p * soft.z).T, soft.seen.T, dout_rows)
        raw = problem.scale * _seen_product(ds, evaluate(slope, soft.env, tables), soft.seen)
        dq[part.rows] += _weighted_sum(raw, soft.seen, k_rows)
        dk[part.keys] += _weighted_sum(raw.T, soft.seen.T, q_rows)
        for slot, dtable in enumerate(dtables):
            if dtable is not None:
                for load_slope, index in table_derivatives(score, slot):
                    value = _seen_product(ds, evaluate(load_slope, soft.env, tables), soft.seen)
                    where = clamped([evaluate(i, soft.env, tables) for i in index], dtable.shape)
                    if where:
                        np.add.at(dtable, tuple(np.broadcast_to(i, value.shape) for i in where), value)
                    else:  # a table without axes has one entry, which every score reads
                        dtable += value.sum()
        if dsinks is not None:
            taken = soft.p_sink != 0
            dsinks[part.head] += (soft.p_sink * (dlse_rows - delta))[taken].sum()
    return Gradients(dq, dk, dv, dtables, dsinks)


def _parts(
    problem: Problem,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
    seqused_k: Array | None,
    block_table: Array | None = None,
    leftpad_k: Array | None = None,
) -> Iterator[_Part]:
    for b in range(problem.batch):
        k_len = problem.seqlen_k if seqused_k is None else int(seqused_k[b])
        keys: tuple[Any, ...] = (b, slice(k_len))
        if cu_seqlens_k is not None:
            first = int(cu_seqlens_k[b])
            k_len = k_len if seqused_k is not None else int(cu_seqlens_k[b + 1]) - first
            keys = (slice(first, first + k_len),)
        elif block_table is not None:
            slots = np.arange(k_len) + (0 if leftpad_k is None else int(leftpad_k[b]))
            keys = (block_table[b, slots // problem.page_size], slots % problem.page_size)
        rows = slice(None)
        if cu_seqlens_q is not None:
            rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        q_len = problem.seqlen_q if cu_seqlens_q is None else rows.stop - rows.start
        for h in range(problem.heads_q):
            where = ((b, rows, h), (b, h)) if cu_seqlens_q is None else ((rows, h), (h, rows))
            yield _Part(b, h, q_len, k_len, where[0], (*keys, h // problem.group), where[1])


def _rows(array: Array, where: tuple[Any, ...]) -> Array:
    return np.asarray(array[where], np.float64)


def _softmax(
    problem: Problem, part: _Part, q: Array, k: Array, tables: Sequence[Array], sinks: Array | None, seed: int
) -> _Softmax:
    shape = (part.q_len, part.k_len)
    row = np.arange(part.q_len)[:, None]
    raw = problem.scale * (q @ k.T)
    env = {
        "score": raw,
        "batch": part.batch,
        "head": part.head,
        "row": row,
        "q": row + part.k_len - part.q_len,
        "k": np.arange(part.k_len),
        "q_len": part.q_len,
        "k_len": part.k_len,
    }
    s = np.broadcast_to(evaluate(parse(problem.program.score or "score"), env, tables), shape)
    allowed = np.broadcast_to(evaluate(parse(problem.program.mask or "true"), env, tables), shape)
    seen = allowed & (s != -np.inf)
    s = np.where(seen, s, -np.inf)
    sink = -np.inf if sinks is None else float(sinks[part.head])

    m = np.maximum(s.max(axis=1, initial=-np.inf), sink)
    some = m != -np.inf
    exp_s = np.where(seen, np.exp(s - m[:, None]), 0.0)
    exp_sink = np.where(some, np.exp(sink - m), 0.0) if sink != -np.inf else np.zeros(part.q_len)
    total = np.where(some, exp_s.sum(axis=1) + exp_sink, 1.0)
    z = np.ones(shape)
    if problem.program.dropout_p > 0:
        z = rng.dropout_factors(problem.program.dropout_p, seed, part.batch, part.head, *shape)
    p = np.where(seen, exp_s / total[:, None], 0.0)
    return _Softmax(env, seen, p, z, m, np.log(total), exp_sink / total)


def _weighted_sum(weights: Array, seen: Array, values: Array) -> Array:
    """sum_j weights_ij values_j over the pairs seen: others add nothing, even where values_j is NaN."""
    finite = np.isfinite(values).all(axis=1)
    total = weights[:, finite] @ values[finite]
    for j in np.flatnonzero(~finite):
        looks = seen[:, j]
        total[looks] += weights[looks, j, None] * values[j]
    return total


def _seen_product(a: Array, b: Array, seen: Array) -> Array:
    return np.where(seen, a * b, 0.0)
