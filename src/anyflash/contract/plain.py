"""Attention written with numpy, forward and backward, one sequence at a time, in any arithmetic.

It shares nothing with `semantics`: masks and scores come from their own numpy spellings, dropout from its own
Philox. In the widest arithmetic it is the truth; in a result's own dtype, rounding after each operation, it
is the plain attention whose error says how far a backend may be off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anyflash.contract.arithmetic import Arithmetic, Place, product
from anyflash.contract.philox import kept
from anyflash.contract.rules import Rule
from anyflash.contract.terms import Term


@dataclass(frozen=True, slots=True)
class Formula:
    """What happens between the scaled product and the softmax, and after it. `factors` are those of scores
    and of out, (batch or 1, query heads), which 8-bit floats come with."""

    scale: float
    terms: Sequence[Term] = ()
    rules: Sequence[Rule] = ()
    dropout_p: float = 0.0
    seed: int = 0
    factors: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True, slots=True)
class OneSequence:
    """Operands of one sequence, heads first: q (Hq, Tq, D), k (Hkv, Tk, D), v (Hkv, Tk, Dv), dout (Hq, Tq,
    Dv), dlse (Hq, Tq), sinks (Hq,); tables by name."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    tables: Mapping[str, np.ndarray]
    sinks: np.ndarray | None = None
    dout: np.ndarray | None = None
    dlse: np.ndarray | None = None

    def without_gradients(self) -> OneSequence:
        return replace(self, dout=None, dlse=None)


@dataclass(slots=True)
class Answer:
    """Results of one sequence, heads first. Gradients are None without `dout`.

    reach     (Hq, Tq, Tk) what the masks allow
    allowed   (Hq, Tq, Tk) what of that has a score other than -inf
    """

    out: np.ndarray
    lse: np.ndarray
    reach: np.ndarray
    allowed: np.ndarray
    dq: np.ndarray | None = None
    dk: np.ndarray | None = None
    dv: np.ndarray | None = None
    tables: dict[str, np.ndarray] | None = None
    sinks: np.ndarray | None = None


def attend(formula: Formula, given: OneSequence, batch: int, a: Arithmetic) -> Answer:
    """out, lse and gradients of one sequence in arithmetic `a`."""
    with np.errstate(all="ignore"):
        return _attend(formula, given, batch, a)


def _attend(formula: Formula, given: OneSequence, batch: int, a: Arithmetic) -> Answer:
    heads, q_len, dim = given.q.shape
    k_len = given.k.shape[1]
    keys, dims = a.shuffle(k_len), a.shuffle(dim)
    group = heads // given.k.shape[0]
    cast = lambda x: x.astype(a.work)
    q, k, v = cast(given.q)[..., dims], cast(given.k)[:, keys][..., dims], cast(given.v)[:, keys]
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    tables = {name: cast(t) if t.dtype.kind in "fV" else t for name, t in given.tables.items()}
    place = Place(batch, heads, q_len, k_len, keys)
    scale = a.work.type(formula.scale)

    allowed = np.ones(place.shape, bool)
    for rule in formula.rules:
        allowed &= rule.allowed(place, tables)

    scaled_q, scaled_k = (q, a(k * scale)) if a.odd else (a(q * scale), k)
    s = a(a.matmul(scaled_q, scaled_k.swapaxes(1, 2)))
    factor_out = None
    if formula.factors is not None:
        factor, factor_out = (
            f[min(batch, len(f) - 1)][:, None, None].astype(a.work) for f in formula.factors
        )
        s = a(s * factor)
    inputs = []
    for term in formula.terms:
        inputs.append(s)
        s = term.forward(s, place, tables, a)
    reach, allowed = allowed, allowed & (s != -np.inf)
    s = np.where(allowed, s, a.work.type(-np.inf))

    peak = s.max(axis=2, initial=-np.inf)
    sinks = None if given.sinks is None else cast(given.sinks)[:, None]
    if sinks is not None:
        peak = np.maximum(peak, sinks)
    pivot = np.where(peak == -np.inf, a.work.type(0), peak)
    e = np.where(allowed, a.exp(s - pivot[..., None]), a.work.type(0))
    total = a.sum(e, (2,))
    if sinks is not None:
        total = total + a.exp(sinks - pivot)
    safe = np.where(total == 0, a.work.type(1), total)
    logsum = np.log(safe)
    p = a.weighed(e) / safe[..., None]
    if a.odd and a.weights is None:
        p = np.where(allowed, a.exp(s - pivot[..., None] - logsum[..., None]), a.work.type(0))
    p = a(p)
    lse = np.where(total == 0, a.work.type(-np.inf), _lse(pivot, safe, a))

    keep = np.ones(place.shape, bool)
    if formula.dropout_p:
        keep = kept(formula.seed, formula.dropout_p, batch, place.head, place.row, place.k)
    rate = a.work.type(1 / (1 - formula.dropout_p)) if formula.dropout_p < 1 else a.work.type(0)
    dropped = a(np.where(keep, p * rate, a.work.type(0)))
    out = a(product(dropped, v, allowed & keep, a))
    if factor_out is not None:
        out = a(out * factor_out)
    back, undo = np.argsort(keys), np.argsort(dims)
    answer = Answer(out, lse, reach[..., back], allowed[..., back])
    if given.dout is None:
        return answer

    dout = cast(given.dout)
    zero = a.work.type(0)
    dp = a(a.matmul(dout, v.swapaxes(1, 2)))
    dp = np.where(allowed & keep, a(dp * rate), zero)
    if a.odd:
        weighted = np.where(allowed.any(axis=2, keepdims=True), dout * out, zero)
    else:
        weighted = np.where(allowed, p * dp, zero)
    delta = a(a.sum(weighted, (2,)))
    rest = delta if given.dlse is None else delta - cast(given.dlse)
    ds = np.where(allowed, a(p * a(dp - rest[..., None])), zero)
    dtables: dict[str, np.ndarray] = {}
    for term, before in zip(reversed(formula.terms), reversed(inputs), strict=True):
        before = np.where(allowed, before, zero)
        ds, found = term.backward(ds, before, place, tables, a)
        ds = np.where(allowed, ds, zero)
        for name, grad in found.items():
            dtables[name] = dtables[name] + grad if name in dtables else grad

    answer.dq = a(a(product(ds, k, allowed, a)) * scale)[..., undo]
    dk = a(_over_rows(ds, q, allowed, group, a) * scale)
    dv = _over_rows(dropped, dout, allowed & keep, group, a)
    answer.dk = dk[:, back][..., undo]
    answer.dv = dv[:, back]
    answer.tables = dtables
    if sinks is not None:
        share = np.where(sinks == -np.inf, zero, a.exp(sinks - pivot) / safe)
        answer.sinks = a.sum(a(-(share * rest)), (1,))
    return answer


def _lse(pivot: np.ndarray, total: np.ndarray, a: Arithmetic) -> np.ndarray:
    """pivot + log(total), by way of base 2 for the odd orders."""
    if not a.odd:
        return pivot + np.log(total)
    return (pivot * a.work.type(np.log2(np.e)) + np.log2(total)) * a.work.type(np.log(2))


def _over_rows(
    weights: np.ndarray, rows: np.ndarray, keep: np.ndarray, group: int, a: Arithmetic
) -> np.ndarray:
    """weights^T @ rows, added up over the query heads of a group: (heads, q, k), (heads, q, d) -> (kv, k, d).

    The odd orders add the rows of all heads of the group one after the other.
    """
    heads, q_len, k_len = weights.shape
    kv = heads // group
    if a.odd:
        weights, rows, keep = (x.reshape(kv, group * q_len, x.shape[2]) for x in (weights, rows, keep))
    summed = a(product(weights.swapaxes(1, 2), rows, keep.swapaxes(1, 2), a))
    if a.odd or group == 1:
        return summed
    return a(a.sum(summed.reshape(kv, group, k_len, rows.shape[2]), (1,)))
