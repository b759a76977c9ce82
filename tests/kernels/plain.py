"""Attention in a given arithmetic, straight from its formula: how far rounding alone may take a result.

It follows `semantics.reference`, but in the type that the kernels add in and in any order of keys and
dimensions; order 0 adds strictly one after the other. With `pairs`, probabilities and their gradients are
rounded to bfloat16 before they are multiplied, as the pair form does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anyflash.core.dtypes import accumulate
from anyflash.semantics import reference, rng
from anyflash.semantics.arrays import numpy_dtype
from anyflash.semantics.derivative import derivative, table_derivatives
from anyflash.semantics.evaluate import clamped, evaluate
from anyflash.semantics.text import parse
from kernels.cases import Array, Given


@np.errstate(all="ignore")
def attention(given: Given, seed: int, pairs: bool, wide: type | None = None) -> dict[str, Array]:
    """Results by name: out, lse, dq, dk, dv, table0 .., dsinks, in the type of the sums, or in `wide`. `seed`
    orders them."""
    problem, case, arrays = given.problem, given.case, given.arrays
    work, kind = numpy_dtype(accumulate(problem.dtype)), numpy_dtype(problem.dtype)
    if wide is not None:
        work = kind = np.dtype(wide)
    order, one_by_one = np.random.default_rng(seed), seed == 0
    narrow = (lambda x: x.astype(numpy_dtype("bfloat16")).astype(work)) if pairs else (lambda x: x)
    score = parse(problem.program.score or "score")
    slope = derivative(score)
    results: dict[str, Array] = {
        name: np.zeros(shape, work)
        for name, shape in (
            ("out", problem.out_shape), ("dq", problem.q_shape), ("dk", problem.k_shape),
            ("dv", problem.v_shape),
        )
    }  # fmt: skip
    results["lse"] = np.full(problem.lse_shape, -np.inf, work)
    for slot, table in enumerate(problem.tables):
        if table.needs_grad:
            results[f"table{slot}"] = np.zeros(table.shape, work)
    if given.sinks is not None:
        results["dsinks"] = np.zeros(problem.heads_q, work)
    lengths = [given.lengths.get(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")]
    dims, dims_v = order.permutation(problem.head_dim), order.permutation(problem.head_dim_v)
    cast = lambda x: np.asarray(x).astype(work)
    for part in reference._parts(problem, *lengths):
        keys = order.permutation(part.k_len)
        q, dout = cast(arrays["q"][part.rows])[:, dims], cast(arrays["dout"][part.rows])[:, dims_v]
        k, v = cast(arrays["k"][part.keys])[keys][:, dims], cast(arrays["v"][part.keys])[keys][:, dims_v]
        row = np.arange(part.q_len)[:, None]
        env: dict[str, Any] = {
            "score": work.type(problem.scale) * (q @ k.T), "batch": part.batch, "head": part.head, "row": row,
            "q": row + part.k_len - part.q_len, "k": keys, "q_len": part.q_len, "k_len": part.k_len,
        }  # fmt: skip
        shape = part.q_len, part.k_len
        s = np.broadcast_to(evaluate(score, env, given.tables, work), shape)
        seen = np.broadcast_to(
            evaluate(parse(problem.program.mask or "true"), env, given.tables, work), shape
        )
        seen = seen & (s != -np.inf)
        sink = work.type(-np.inf) if given.sinks is None else cast(given.sinks)[part.head]
        m = np.maximum(np.where(seen, s, -np.inf).max(axis=1, initial=-np.inf), sink)
        pivot = np.where(m == -np.inf, work.type(0), m)[:, None]
        e = np.where(seen, np.exp(s - pivot), work.type(0))
        e_sink = np.exp(sink - pivot)
        total = e.sum(axis=1, keepdims=True) + e_sink
        inverse = np.where(total == 0, work.type(0), 1 / total)
        z = np.ones(shape, work)
        if problem.program.dropout_p:
            every = rng.dropout_factors(problem.program.dropout_p, given.seed, part.batch, part.head, *shape)
            z = every[:, keys].astype(work)
        out = product(narrow(e * z), v, seen, one_by_one) * inverse
        results["out"][part.rows] = put(out, dims_v)
        results["lse"][part.lse] = (m[:, None] + np.log(np.where(total == 0, 1, total)))[:, 0]

        # Order 0 takes the probability from the logarithm of the sum, as one does who has kept only that.
        p = (
            np.where(seen, np.exp(s - pivot - np.log(np.where(total == 0, 1, total))), 0)
            if one_by_one
            else e * inverse
        )
        live = seen.any(axis=1)
        rounded = out.astype(kind).astype(work)
        delta = np.where(live, (np.where(rounded == 0, 0, dout) * rounded).sum(axis=1), 0)
        dlse = cast(arrays["dlse"][part.lse]) if case.dlse else np.zeros(part.q_len, work)
        ds = np.where(seen, p * (z * (dout @ v.T) - (delta - dlse)[:, None]), 0)
        raw = np.where(seen, ds * evaluate(slope, env, given.tables, work), 0)
        results["dq"][part.rows] += put(
            work.type(problem.scale) * product(narrow(raw), k, seen, one_by_one), dims
        )
        dk = work.type(problem.scale) * product(narrow(raw).T, q, seen.T, one_by_one)
        dv = product(narrow(p * z).T, dout, seen.T, one_by_one)
        for name, value, turn in (("dk", dk, dims), ("dv", dv, dims_v)):
            results[name][part.keys] += put(put(value, turn), keys, 0)
        for slot, table in enumerate(problem.tables):
            if table.needs_grad:
                for load_slope, index in table_derivatives(score, slot):
                    value = np.where(seen, ds * evaluate(load_slope, env, given.tables, work), 0)
                    where = clamped([evaluate(i, env, given.tables) for i in index], table.shape)
                    np.add.at(results[f"table{slot}"], tuple(np.broadcast_to(i, shape) for i in where), value)
        if given.sinks is not None:
            share = (e_sink * inverse)[:, 0]
            results["dsinks"][part.head] += np.add.accumulate(
                np.where(share != 0, share * (dlse - delta), 0)
            )[-1:].sum()
    return results


def put(values: Array, order: Array, axis: int = 1) -> Array:
    """Undo `values = result.take(order, axis)`."""
    return values.take(np.argsort(order), axis)


def product(weights: Array, values: Array, seen: Array, one_by_one: bool) -> Array:
    """The matrix product over the pairs seen: others add nothing, even where a value is NaN."""
    weights = np.where(seen, weights, 0)
    finite = np.isfinite(values).all(axis=1)
    if one_by_one:
        total = np.zeros((len(weights), values.shape[1]), values.dtype)
        for column, value, look, good in zip(weights.T, values, seen.T, finite, strict=True):
            term = column[:, None] * value
            total += term if good else np.where(look[:, None], term, 0)
        return total
    if finite.all():
        return weights @ values
    return np.where(seen[..., None], weights[..., None] * values, 0).sum(axis=1)
