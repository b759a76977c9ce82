"""The definition against torch autograd, finite differences, and the promises about what is masked.

The torch side is written by hand for each case and shares nothing with the expressions but their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from anyflash.semantics import reference, rng
from anyflash.semantics.problem import Problem, Program, TableSpec

torch = pytest.importorskip("torch")

# float64 rounding of sums of at most a few hundred products, relative to results of order one.
TOLERANCE = 2.0**-52 * 2**12


def no_mask(i, j, b, h):
    return torch.ones((), dtype=torch.bool)


def no_score(s, q, k, b, h, t):
    return s


@dataclass(frozen=True)
class Case:
    id: str
    score: str | None = None
    mask: str | None = None
    torch_score: Callable[..., Any] = no_score  # (s, q position, k, batch, head, tables)
    torch_mask: Callable[..., Any] = no_mask  # (q position, k, batch, head)
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict)  # float tables by name, in slot order
    dims: tuple[int, ...] = (2, 4, 4, 5, 7, 3, 2)  # batch, heads, key heads, queries, keys, dim, value dim
    sinks: bool = False
    dropout: float = 0.0
    scale: float | None = None
    lengths: tuple[tuple[int, int], ...] = ()  # packed: (queries, keys) of each sequence
    used: tuple[int, ...] = ()


def slopes(s, q, k, b, h, t):
    return s - t[0][h] * (q - k).abs()


def cap_and_table(s, q, k, b, h, t):
    s = 3.0 * torch.tanh(s / 3.0)
    return torch.where(q - k < 2, s * t[0][h], s + t[1][((q - k).clamp(0, 4)).long()])


CASES = [
    Case("plain"),
    Case("scale", scale=-0.3),
    Case("mqa", dims=(2, 6, 1, 4, 5, 3, 4)),
    Case("gqa", dims=(1, 6, 2, 4, 5, 3, 4)),
    Case("one key", dims=(1, 1, 1, 3, 1, 1, 1)),
    Case("causal", mask="(le k q)", torch_mask=lambda i, j, b, h: j <= i),
    Case(
        "causal with empty rows",
        mask="(le k q)",
        torch_mask=lambda i, j, b, h: j <= i,
        dims=(1, 2, 2, 7, 4, 3, 2),
    ),
    Case(
        "window",
        mask="(and (le (sub q 2) k) (le k (add q 1)))",
        torch_mask=lambda i, j, b, h: (i - 2 <= j) & (j <= i + 1),
    ),
    Case("no key anywhere", mask="false", torch_mask=lambda i, j, b, h: torch.zeros((), dtype=torch.bool)),
    Case(
        "softcap",
        score="(mul 2.0 (tanh (div score 2.0)))",
        torch_score=lambda s, q, k, b, h, t: 2.0 * torch.tanh(s / 2.0),
    ),
    Case(
        "slopes",
        score="(sub score (mul (load 0:f head) (float (abs (sub q k)))))",
        torch_score=slopes,
        tables={"slopes": (4,)},
    ),
    Case(
        "two biases",
        score="(add (add score (load 0:f batch k)) (load 1:f head row k))",
        torch_score=lambda s, q, k, b, h, t: s + t[0][b][k] + t[1][h],
        tables={"pair": (2, 7), "mask": (4, 5, 7)},
    ),
    Case(
        "a formula of its own",
        score="(where (lt (sub q k) 2) (mul (mul 3.0 (tanh (div score 3.0))) (load 0:f head)) "
        "(add (mul 3.0 (tanh (div score 3.0))) (load 1:f (sub q k))))",
        torch_score=cap_and_table,
        tables={"gain": (4,), "distance": (5,)},
        mask="(le k q)",
        torch_mask=lambda i, j, b, h: j <= i,
    ),
    Case(
        "score as mask",
        score="(where (le k q) score -inf)",
        torch_score=lambda s, q, k, b, h, t: torch.where(k <= q, s, -math.inf),
    ),
    Case("sinks", sinks=True, mask="(lt k row)", torch_mask=lambda i, j, b, h: j < i - 2),
    Case("dropout", dropout=0.3, mask="(le k q)", torch_mask=lambda i, j, b, h: j <= i),
    Case(
        "packed",
        lengths=((3, 3), (0, 4), (2, 5), (4, 0), (3, 2)),
        mask="(le k q)",
        torch_mask=lambda i, j, b, h: j <= i,
    ),
    Case("packed, some keys used", lengths=((3, 3), (2, 5), (1, 4)), used=(2, 0, 4), sinks=True, dropout=0.2),
    Case(
        "packed with a bias a sequence",
        lengths=((3, 3), (2, 5)),
        score="(add score (load 0:f batch head))",
        torch_score=lambda s, q, k, b, h, t: s + t[0][b, h],
        tables={"bias": (2, 4)},
    ),
]


class Setup:
    """The Problem of a case, and random inputs in float64."""

    def __init__(self, case: Case) -> None:
        batch, heads, heads_kv, n_q, n_k, dim, dim_v = case.dims
        r = np.random.default_rng(crc32(case.id.encode()))
        packed = bool(case.lengths)
        if packed:
            batch = len(case.lengths)
            cu_q = np.cumsum([0, *(a for a, _ in case.lengths)])
            cu_k = np.cumsum([0, *(b for _, b in case.lengths)])
            total_q, total_k = int(cu_q[-1]) + 1, int(cu_k[-1]) + 2
            n_q, n_k = max(a for a, _ in case.lengths), max(b for _, b in case.lengths)
        self.problem = Problem(
            Program(case.score, case.mask, case.scale, case.dropout, case.sinks),
            "float64",
            batch,
            heads,
            heads_kv,
            n_q,
            n_k,
            dim,
            dim_v,
            tuple(TableSpec("float64", shape, True) for shape in case.tables.values()),
            "varlen" if packed else "dense",
            total_q if packed else 0,
            total_k if packed else 0,
            bool(case.used),
        )
        p = self.problem
        self.case = case
        self.q, self.k, self.v = (r.normal(size=s) for s in (p.q_shape, p.k_shape, p.v_shape))
        self.tables = tuple(r.normal(size=s) for s in case.tables.values())
        self.sinks = r.normal(size=heads) if case.sinks else None
        self.cu_q, self.cu_k = (cu_q, cu_k) if packed else (None, None)
        self.used = np.array(case.used) if case.used else None
        self.seed = 11
        self.dout, self.dlse = r.normal(size=p.out_shape), r.normal(size=p.lse_shape)

    @property
    def inputs(self):
        return self.q, self.k, self.v, self.tables, self.sinks, self.cu_q, self.cu_k, self.used, self.seed

    def forward(self):
        return reference.forward(self.problem, *self.inputs)

    def backward(self):
        return reference.backward(self.problem, *self.inputs, self.dout, self.dlse)


def by_torch(setup):
    """(out, lse, leaves): attention of a case spelled in torch operations, leaves wanting gradients."""
    case, p = setup.case, setup.problem
    q, k, v = (torch.tensor(a, requires_grad=True) for a in (setup.q, setup.k, setup.v))
    tables = [torch.tensor(a, requires_grad=True) for a in setup.tables]
    sinks = None if setup.sinks is None else torch.tensor(setup.sinks, requires_grad=True)
    out = torch.zeros(p.out_shape, dtype=torch.float64)
    lse = torch.full(p.lse_shape, -math.inf, dtype=torch.float64)
    for b in range(p.batch):
        if case.lengths:
            rows = torch.arange(int(setup.cu_q[b]), int(setup.cu_q[b + 1]))
            keys = torch.arange(int(setup.cu_k[b]), int(setup.cu_k[b + 1]))
            keys = keys[: case.used[b]] if case.used else keys
        for h in range(p.heads_q):
            h_kv = h // (p.heads_q // p.heads_kv)
            if case.lengths:
                qs, ks, vs = q[rows, h], k[keys, h_kv], v[keys, h_kv]
            else:
                qs, ks, vs = q[b, :, h], k[b, :, h_kv], v[b, :, h_kv]
            n_q, n_k = len(qs), len(ks)
            i, j = torch.arange(n_q)[:, None] + n_k - n_q, torch.arange(n_k)
            scale = p.head_dim**-0.5 if case.scale is None else case.scale
            s = case.torch_score(qs @ ks.T * scale, i, j, b, h, tables)
            s = s.masked_fill(~case.torch_mask(i, j, b, h).expand(n_q, n_k), -math.inf)
            if sinks is not None:
                s = torch.cat([s, sinks[h].expand(n_q, 1)], dim=1)
            some = (s != -math.inf).any(1)
            part = torch.softmax(s[some], 1)[:, :n_k]
            z = torch.ones(n_q, n_k, dtype=torch.float64)
            if case.dropout:
                z = torch.tensor(rng.dropout_factors(case.dropout, setup.seed, b, h, n_q, n_k))
            result = (part * z[some]) @ vs
            sums = torch.logsumexp(s[some], 1)
            if case.lengths:
                out[rows[some], h], lse[h, rows[some]] = result, sums
            else:
                out[b, some, h], lse[b, h, some] = result, sums
    return out, lse, (q, k, v, *tables, *([] if sinks is None else [sinks]))


def near(a, b):
    np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_forward_and_backward_equal_torch(case):
    setup = Setup(case)
    out, lse, leaves = by_torch(setup)
    found = setup.forward()
    near(found.out, out.detach().numpy())
    near(found.lse, lse.detach().numpy())
    near(found.stats[0] + found.stats[1], found.lse)

    some = lse != -math.inf
    total = (out * torch.tensor(setup.dout)).sum() + (lse[some] * torch.tensor(setup.dlse)[some]).sum()
    expected = [
        np.zeros(leaf.shape) if g is None else g.numpy()
        for leaf, g in zip(
            leaves,
            torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * 9,
            strict=False,
        )
    ]
    grads = setup.backward()
    got = [grads.dq, grads.dk, grads.dv, *grads.dtables, *([] if grads.dsinks is None else [grads.dsinks])]
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        near(g, e)


def by_name(name):
    return Setup(next(c for c in CASES if c.id == name))


@pytest.mark.parametrize("name", ["a formula of its own", "sinks", "packed, some keys used", "two biases"])
def test_backward_equals_finite_differences(name):
    setup = by_name(name)
    grads = setup.backward()
    pairs = [(setup.q, grads.dq), (setup.k, grads.dk), (setup.v, grads.dv)]
    pairs += list(zip(setup.tables, grads.dtables, strict=True))
    pairs += [] if setup.sinks is None else [(setup.sinks, grads.dsinks)]
    r = np.random.default_rng(3)

    def loss():
        found = setup.forward()
        some = found.lse != -np.inf
        return (found.out * setup.dout).sum() + (found.lse[some] * setup.dlse[some]).sum()

    step = 1e-5
    for array, grad in pairs:
        direction = r.normal(size=array.shape)
        array += step * direction
        high = loss()
        array -= 2 * step * direction
        low = loss()
        array += step * direction
        expected = (grad * direction).sum()
        # The difference quotient errs by step ** 2 and by the loss's rounding over the step.
        assert abs((high - low) / (2 * step) - expected) < 1e3 * step**2 * max(1.0, abs(expected))


def all_values(setup):
    found, grads = setup.forward(), setup.backward()
    return [*found, *grads[:3], *grads.dtables, *([] if grads.dsinks is None else [grads.dsinks])]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_nobody_sees_may_hold_anything(poison):
    case = Case(
        "poison",
        score="(add score (load 0:f k))",
        mask="(and (lt k 4) (lt 1 row))",
        tables={"t": (7,)},
    )
    clean = Setup(case)
    dirty = Setup(case)
    for array in (dirty.k, dirty.v):
        array[:, 4:] = poison
    dirty.q[:, :2] = poison
    dirty.dout[:, :2] = poison
    dirty.dlse[:, :, :2] = poison
    dirty.tables[0][4:] = poison
    for a, b in zip(all_values(clean), all_values(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


def test_packed_rows_past_a_length_may_hold_anything():
    clean, dirty = by_name("packed, some keys used"), by_name("packed, some keys used")
    unused = np.ones(len(dirty.k), bool)
    for b, n in enumerate(dirty.case.used):
        unused[dirty.cu_k[b] : dirty.cu_k[b] + n] = False
    dirty.k[unused] = dirty.v[unused] = np.nan
    dirty.q[dirty.cu_q[-1] :] = np.nan
    for a, b in zip(all_values(clean), all_values(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_in_a_seen_element_reaches_exactly_what_sees_it():
    setup = Setup(Case("nan", mask="(le k q)", dims=(1, 1, 1, 4, 4, 2, 2)))
    setup.v[0, 2] = np.nan
    out = setup.forward().out
    assert np.isfinite(out[0, :2]).all()
    assert np.isnan(out[0, 2:]).all()

    setup = Setup(Case("nan", mask="(le k q)", dims=(1, 1, 1, 4, 4, 2, 2)))
    setup.q[0, 1] = np.nan
    found, grads = setup.forward(), setup.backward()
    assert np.isnan(found.out[0, 1]).all()
    assert np.isnan(found.lse[0, 0, 1])
    assert np.isfinite(np.delete(found.out, 1, axis=1)).all()
    assert np.isnan(grads.dk[0, :2]).all()
    assert np.isfinite(grads.dk[0, 2:]).all()
    assert np.isfinite(grads.dv[0, 2:]).all()


def test_a_finite_mask_of_huge_negatives_keeps_its_gradient():
    """Adding one constant to a row changes neither output nor gradients, whatever its size."""
    dims = (1, 2, 2, 3, 4, 3, 2)
    plain = Setup(Case("shift", score="(add score 0.0)", dims=dims, scale=0.5))
    shifted = Setup(Case("shift", score="(add score -1073741824.0)", dims=dims, scale=0.5))
    # Eighths survive the addition of a power of two exactly, so no rounding blurs the comparison.
    for setup in (plain, shifted):
        setup.q[...], setup.k[...] = np.round(setup.q * 2) / 2, np.round(setup.k * 2) / 2
    a, b = plain.forward(), shifted.forward()
    near(b.out, a.out)
    np.testing.assert_array_equal(b.stats[0], a.stats[0] - 2.0**30)
    near(b.stats[1], a.stats[1])
    for x, y in zip(plain.backward()[:3], shifted.backward()[:3], strict=True):
        near(y, x)


def test_sinks_of_minus_infinity_are_no_sinks():
    with_sinks = by_name("sinks")
    with_sinks.sinks[:] = -np.inf
    without = by_name("sinks")
    without.sinks = None
    for a, b in zip(all_values(with_sinks)[:6], all_values(without)[:6], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(with_sinks.backward().dsinks, 0.0)


def test_rows_without_a_key():
    setup = by_name("no key anywhere")
    found = setup.forward()
    assert not found.out.any()
    assert (found.lse == -np.inf).all()
    assert (found.stats[0] == -np.inf).all()
    assert not found.stats[1].any()
    assert not any(g.any() for g in setup.backward()[:3])

    only_sink = Setup(Case("sink", mask="false", sinks=True))
    found = only_sink.forward()
    np.testing.assert_array_equal(found.lse, np.broadcast_to(only_sink.sinks[:, None], (2, 4, 5)))
    near(only_sink.backward().dsinks, only_sink.dlse.sum((0, 2)))


def test_tables_without_a_wish_for_gradients_get_none():
    setup = by_name("two biases")
    specs = tuple(TableSpec(t.dtype, t.shape, i == 1) for i, t in enumerate(setup.problem.tables))
    setup.problem = replace(setup.problem, tables=specs)
    first, second = setup.backward().dtables
    assert first is None
    assert second is not None
