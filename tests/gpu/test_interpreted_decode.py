"""The kernel of calls over a cache under Triton's interpreter: the cache's own cases, and what a device may
find that the host has not looked at.

In a process of its own, as test_interpreted.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import numpy as np
import torch
import triton
import triton.runtime.interpreter as interpreter

import anyflash as af
from anyflash.backends.triton import BACKEND
from anyflash.contract import direct
from anyflash.contract.cases import Packed
from anyflash.contract.poison import Layout, Poisoned
from anyflash.contract.run import assess, known
from anyflash.kernels.triton import launch_decode, schedule
from anyflash.semantics.operands import Operands, Results
from anyflash.semantics.problem import Problem, Program
from kvcache.cases import CASES, NARROW
from kvcache.laying import FORMS, Form, lay_out
from kvcache.test_independence import CASES as MIXED
from kvcache.test_independence import each

NEW = triton.__version__ >= "3.9"
EPS = float(np.finfo(np.float32).eps)


def sample() -> list[Any]:
    """Every other case in one form of a cache, new keys or none; a few with the older Triton."""
    chosen = [c for c in (*CASES, *NARROW) if c.dtype != "float64"]
    pairs = [
        pytest.param(case, FORMS[i % len(FORMS)], i % 4 // 2, id=f"{case.id}-{FORMS[i % len(FORMS)].id}")
        for i, case in enumerate(chosen)
    ]
    return pairs[::2] if NEW else pairs[::16]


@pytest.mark.parametrize(("case", "form", "new"), sample())
def test_results(case: Any, form: Form, new: int) -> None:
    values, truth = known(case)
    lens = tuple(map(min, case.packed.lens_q, case.packed.lens_k)) if new else None
    laid = lay_out(case, values, form, lens)
    verdicts = assess(case, laid.canonical(*laid.run("triton")), truth, ("forward",))
    assert not [v.complaint for v in verdicts if v.complaint]
    for found, expected in ((laid.cache["k"], laid.after_k), (laid.cache["v"], laid.after_v)):
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("case", MIXED[:: 1 if NEW else 4], ids=lambda case: case.id)
def test_batch_does_not_matter(case: Any) -> None:
    """Few, some and many rows beside each other, alone, and in another order, through other pages."""
    case = replace(case, packed=Packed((1, 9, 70, 1, 0), (300, 129, 200, 0, 40)), dtype="bfloat16")
    values, _ = known(case)
    forms = [next(f for f in FORMS if f.id == name) for name in ("pages_of_3", "pages_of_256", "dense")]
    whole = each(case, values, "triton", forms[0], (0, 1, 2, 3, 4), seed=0)
    for seed, (form, pick) in enumerate(zip(forms, ((4, 2, 1, 0), (0,), (1, 3)), strict=True), 1):
        for sequence, bits in each(case, values, "triton", form, pick, seed).items():
            assert bits == whole[sequence], (form.id, pick, sequence)


@dataclass
class Cached:
    """A call over pages, as a device would be handed it: nobody has looked at its integers."""

    lens: tuple[int, ...] = (200, 0, 77)
    q_lens: tuple[int, ...] = (1, 1, 1)
    packed: bool = False
    page_size: int = 16
    group: int = 2
    heads_kv: int = 2
    dim: int = 16
    leftpad: tuple[int, ...] | None = None
    index: str = "int32"
    mask: str | None = None
    score: str | None = None
    dtype: str = "float32"
    spread: bool = False

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        pad = np.array(self.leftpad or [0] * len(self.lens))
        pages = -(-(np.array(self.lens) + pad) // self.page_size)
        each_has, num_pages = int(pages.max()) + 2, int(pages.sum()) + 2
        order = rng.permutation(num_pages)
        self.table = rng.choice([-1, -9, 10**6], (len(self.lens), each_has)).astype(self.index)
        cache = np.full((2, num_pages, self.page_size, self.heads_kv, self.dim), np.nan)
        self.keys = [rng.standard_normal((2, n, self.heads_kv, self.dim)) for n in self.lens]
        taken = 0
        for b, (n, count) in enumerate(zip(self.lens, pages, strict=True)):
            self.table[b, :count] = order[taken : taken + count]
            taken += count
            for j in range(n):
                page, row = divmod(int(pad[b]) + j, self.page_size)
                cache[:, self.table[b, page], row] = self.keys[b][:, j]
        heads, total = self.group * self.heads_kv, sum(self.q_lens)
        self.q = rng.standard_normal((total, heads, self.dim))
        self.cache, self.pad, self.used = cache, pad, np.array(self.lens)
        longest = each_has * self.page_size
        self.problem = Problem(
            Program(self.score, self.mask),
            self.dtype,
            len(self.lens),
            heads,
            self.heads_kv,
            total if self.packed else self.q_lens[0],
            1 << (longest - 1).bit_length(),
            self.dim,
            self.dim,
            addressing="paged",
            total_q=total if self.packed else 0,
            packed=self.packed,
            num_pages=num_pages,
            page_size=self.page_size,
            seqused_k=True,
            leftpad_k=self.leftpad is not None,
        )

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """out (total, heads, dim) and lse (heads, total); everything lies in poisoned memory."""
        problem = self.problem
        gaps = Layout(gap=3, step=2) if self.spread else Layout()
        q, k, v = (
            Poisoned.of(x.reshape(shape), self.dtype)
            for x, shape in ((self.q, problem.q_shape), (self.cache[0], problem.k_shape),
                             (self.cache[1], problem.v_shape))
        )  # fmt: skip
        integers = [Poisoned.of(x, self.index) for x in (self.used, self.pad, np.cumsum([0, *self.q_lens]))]
        table = Poisoned.of(self.table, self.index, gaps)
        out, lse, stats = (
            Poisoned(shape, dtype, output=True)
            for shape, dtype in (
                (problem.out_shape, self.dtype),
                (problem.lse_shape, "float32"),
                ((2, *problem.lse_shape), "float32"),
            )
        )
        operands = Operands(
            q.view,
            k.view,
            v.view,
            seqused_k=integers[0].view,
            leftpad_k=integers[1].view if self.leftpad is not None else None,
            cu_seqlens_q=integers[2].view if self.packed else None,
            block_table=table.view,
        )
        BACKEND.forward(problem, "", operands, Results(out.view, lse.view, stats.view))
        for array in (q, k, v, *integers, table, out, lse, stats):
            assert array.damage() is None
        found = lse.array if self.packed else lse.array.swapaxes(0, 1).reshape(problem.heads_q, -1)
        return out.array.reshape(-1, problem.heads_q, self.dim).copy(), found.copy()

    def truth(self, causal: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The same in float64, from the keys themselves."""
        outs, logs = [], []
        ends = np.cumsum([0, *self.q_lens])
        for b, n in enumerate(self.lens):
            k, v = (np.repeat(x, self.group, 1) for x in self.keys[b])
            s = np.einsum("ihd,jhd->hij", self.q[ends[b] : ends[b + 1]], k) * self.dim**-0.5
            q_len = self.q_lens[b]
            if causal:
                s[:, np.arange(n)[None, :] > np.arange(q_len)[:, None] + n - q_len] = -np.inf
            top = np.max(s, 2, keepdims=True, initial=-1e300)
            p = np.exp(s - top)
            total = p.sum(2, keepdims=True)
            with np.errstate(divide="ignore"):
                logs.append((np.log(total) + top)[..., 0] if n else np.full((len(p), q_len), -np.inf))
            outs.append(np.einsum("hij,jhd->ihd", p / np.where(total == 0, 1, total), v))
        return np.concatenate(outs), np.concatenate(logs, 1)

    def check(self, causal: bool = False) -> None:
        (out, lse), (want_out, want_lse) = self.run(), self.truth(causal)
        assert np.abs(out - want_out).max() <= 64 * EPS * max(1.0, np.abs(want_out).max())
        np.testing.assert_allclose(lse, want_lse, rtol=64 * EPS, atol=64 * EPS)


CAUSAL = "(le k q)"
RULES = ({"causal": True}, {"window": (300, 0), "softcap": 5.0})
# Tokens, heads of the group, keys
HIDDEN = {
    "few_one_segment": (3, 2, 40),
    "few": (3, 2, 300),
    "some": (12, 3, 300),
    "many": (70, 2, 100),
}
CALLS = {
    "pages_of_1": Cached(page_size=1),
    "pages_of_3": Cached(page_size=3, spread=True),
    "pages_of_16": Cached(index="int64"),
    "pages_of_64": Cached(page_size=64),
    "pages_of_256": Cached(page_size=256, index="int64", spread=True),
    "leftpad": Cached(page_size=64, leftpad=(3, 40, 64)),
    "group_1": Cached(group=1, page_size=32),
    "group_6": Cached(group=6, heads_kv=1),
    "group_71": Cached(group=71, heads_kv=1, lens=(90,), q_lens=(1,)),
    "odd_dim": Cached(dim=21, page_size=32),
    "dim_96": Cached(dim=96, lens=(200,), q_lens=(1,)),
    "speculative": Cached(q_lens=(3, 3, 3), lens=(200, 3, 77), group=6, mask=CAUSAL),
    "packed": Cached(q_lens=(2, 0, 40), lens=(200, 9, 150), group=4, packed=True, mask=CAUSAL),
}


@pytest.mark.parametrize("name", list(CALLS)[:: 1 if NEW else 6])
def test_a_call_that_nobody_looked_at(name: str) -> None:
    call = CALLS[name]
    call.check(causal=call.mask is not None)


@pytest.mark.parametrize("page_size", [16, 32] if NEW else [16])
@pytest.mark.parametrize("packed", [False, True] if NEW else [True])
def test_integers_that_are_wrong(page_size: int, packed: bool) -> None:
    """Lengths and pages outside the cache: no memory outside it is read, other sequences are right."""
    call = Cached(lens=(150, 70, 33), page_size=page_size, packed=packed, leftpad=(0, 0, 1))
    want, _ = call.truth()
    call.used = np.array([150, 10**8, -5])
    call.pad = np.array([0, -7, -3])
    call.table[1:] = [[10**9], [-(10**9)]]
    call.table[1, ::2] = -(10**9)
    out, lse = call.run()
    assert np.abs(out[0] - want[0]).max() <= 64 * EPS * np.abs(want[0]).max()
    call.pad = np.array([0, 10**8, 10**8])
    assert (call.run()[0][1] == 0).all()
    assert (out[2] == 0).all()
    assert (lse[:, 2] == -np.inf).all()


def test_any_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever segment comes last adds the others up, to the same bits; and leaves the counters at zero."""
    call = Cached(lens=(500, 64, 130), group=3, page_size=16)
    shared = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launch_decode, "counters", lambda count, device: shared)
    builder = interpreter.interpreter_builder
    own = type(builder).set_grid_idx
    found = []
    for number in (lambda x, n: x, lambda x, n: n - 1 - x, lambda x, n: (x * 5 + 3) % n):

        def mixed(self: Any, x: int, y: int, z: int, number: Any = number) -> None:
            programs = self.grid_dim[0]
            own(self, number(x, programs) if programs % 5 else x, y, z)

        monkeypatch.setattr(type(builder), "set_grid_idx", mixed)
        out, lse = call.run()
        found.append(out.tobytes() + lse.tobytes())
        assert not shared.any()
    assert len(set(found)) == 1
    assert schedule.cut("few", "interpreter").segments % 5


@pytest.mark.parametrize("rows", list(HIDDEN)[:: 1 if NEW else 3])
@pytest.mark.parametrize("dim", [16, 21] if NEW else [21])
def test_nan_in_what_a_row_does_not_see(rows: str, dim: int) -> None:
    q_len, group, length = HIDDEN[rows]
    call = Cached((length,), (q_len,), group=group, heads_kv=1, page_size=32, mask=CAUSAL, dim=dim)
    clean, clean_lse = call.run()
    # Seen by the last two rows alone.
    page, row = divmod(length - 2, 32)
    call.cache[1, call.table[0, page], row] = np.nan
    out, lse = call.run()
    np.testing.assert_array_equal(out[:-2], clean[:-2])
    assert np.isnan(out[-2:]).all()
    np.testing.assert_array_equal(lse, clean_lse)
    call.cache[0, call.table[0, page], row] = np.nan
    out, lse = call.run()
    np.testing.assert_array_equal(out[:-2], clean[:-2])
    np.testing.assert_array_equal(lse[:, :-2], clean_lse[:, :-2])
    assert np.isnan(out[-2:]).all()
    assert np.isnan(lse[:, -2:]).all()


def test_a_mask_that_depends_on_the_head() -> None:
    """One tile has several heads, so no class holds for all of it."""
    call = Cached((200,), (1,), group=4, heads_kv=1, mask="(le (mod k 4) head)")
    out, _ = call.run()
    k, v = call.keys[0][:, :, 0]
    for head in range(4):
        seen = np.arange(200) % 4 <= head
        s = k[seen] @ call.q[0, head] * call.dim**-0.5
        p = np.exp(s - s.max())
        assert np.abs(out[0, head] - p @ v[seen] / p.sum()).max() <= 64 * EPS


@pytest.mark.parametrize("rules", RULES[:: 1 if NEW else 2], ids=str)
def test_dense_calls_of_few_queries(rules: dict[str, Any]) -> None:
    """They are split over keys too, and their backward goes on from what the kernel leaves."""
    rng = np.random.default_rng(0)
    length = schedule.DECODE_KEYS + 10
    q, dout = (rng.standard_normal((1, 2, 4, 16)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((1, length, 2, 16)).astype(np.float32) for _ in range(2))
    problem, _ = direct.prepare(q, k, v, **rules)
    assert launch_decode.serves(problem)
    assert not launch_decode.serves(replace(problem, seqlen_q=200))
    found, wanted = (direct.attend(name, q, k, v, dout=dout, **rules) for name in ("triton", "reference"))
    for name in ("out", "lse", "dq", "dk", "dv"):
        mine, other = getattr(found, name), getattr(wanted, name)
        assert np.abs(mine - other).max() <= 64 * EPS * np.abs(other).max()


def test_explained_by_what_is_launched() -> None:
    x = np.ones((2, 1, 2, 16), np.float32)
    rows = np.ones((2, schedule.DECODE_KEYS, 2, 16), np.float32)
    said = str(af.explain(x, rows, rows, backend="triton"))
    assert "forward, few rows" in said
    assert "16 x 32, 4 warps, 1 stages, at most 8 segments of 64 keys or more" in said
    assert "some rows" not in said


def test_segments_fit_the_grid() -> None:
    """No number of tiles has more segments than the grid that the bound of all keys gives."""
    for arch in ("sm_90", "interpreter"):
        for rows in schedule.ROWS:
            cut = schedule.cut(rows, arch)
            for block_n in (16, 32, 64):
                least = max(cut.keys // block_n, 1)
                parts = [max(-(-tiles // max(-(-tiles // cut.segments), least)), 1) for tiles in range(600)]
                for bound in range(len(parts)):
                    assert max(parts[: bound + 1]) <= min(cut.segments, max(-(-bound // least), 1))
