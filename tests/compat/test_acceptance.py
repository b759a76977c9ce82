"""flash_attn's own acceptance rule, over its own axes and on the CPU.

The error is at most twice that of plain attention in the same dtype, that of gradients three times. The cases
are a fixed sample of all combinations.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anyflash.compat import flash_attn
from compat import plain

CASES = 56
FORWARD, GRADIENT = 2.0, 3.0

AXES = {
    "dtype": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "form": (
        "dense",
        "qkvpacked",
        "kvpacked",
        "varlen",
        "varlen qkvpacked",
        "varlen kvpacked",
        "varlen paged",
    ),
    "dim": (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256),
    "lengths": ((57, 101), (64, 109), (57, 105), (54, 128), (128, 56), (64, 64), (1, 73), (3, 49)),
    "heads": ((6, 6), (6, 1), (6, 2)),
    "causal": (False, True),
    "window": ((-1, -1), (-1, -1), (19, 6), (32, -1), (3, 5)),
    "alibi": (False, True),
    "softcap": (0.0, 0.0, 50.0, 3.0),
    "dropout_p": (0.0, 0.17),
}


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    form: str
    dim: int
    lengths: tuple[int, int]
    heads: tuple[int, int]
    causal: bool
    window: tuple[int, int]
    alibi: bool
    softcap: float
    dropout_p: float
    seed: int

    def __str__(self) -> str:
        said = [str(getattr(self, f.name)).removeprefix("torch.") for f in fields(self)]
        return "-".join(said).replace(" ", "")


def sample() -> list[Case]:
    """Each axis runs through its values in an order of its own, so every value occurs equally often."""
    rng = random.Random(20220527)
    columns = {}
    for name, values in AXES.items():
        column = [values[i % len(values)] for i in range(CASES)]
        rng.shuffle(column)
        columns[name] = column
    return [Case(**{name: column[i] for name, column in columns.items()}, seed=i) for i in range(CASES)]


SAMPLE = sample()


def test_sample_has_every_value() -> None:
    for name, values in AXES.items():
        assert {getattr(case, name) for case in SAMPLE} == set(values), name


class Sequences:
    """Random arrays of a case. Packed ones are three sequences, one of them without queries."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        (rows, keys), (heads, heads_k), dim = case.lengths, case.heads, case.dim
        if "qkv" in case.form:
            rows, heads_k = keys, heads
        self.case, self.varlen = case, "varlen" in case.form
        self.batch = 3 if self.varlen else 2
        self.q_lens, self.k_lens = [rows] * self.batch, [keys] * self.batch
        if self.varlen:
            self.q_lens = [rows, 0, max(rows // 3, 1)]
            self.k_lens = self.q_lens if "qkv" in case.form else [keys, keys // 2, keys - 5]
        normal = lambda n, h: torch.randn(n, h, dim, dtype=torch.float64).to(case.dtype)
        q_total, k_total = sum(self.q_lens), sum(self.k_lens)
        self.q, self.dout = normal(q_total, heads), normal(q_total, heads)
        self.k, self.v = normal(k_total, heads_k), normal(k_total, heads_k)
        self.slopes = torch.rand(self.batch, heads) * 0.3 if case.alibi else None

    def parts(self) -> Iterator[tuple[int, slice, slice]]:
        """(sequence, its rows, its keys)"""
        q_at = k_at = 0
        for b, (q_len, k_len) in enumerate(zip(self.q_lens, self.k_lens, strict=True)):
            yield b, slice(q_at, q_at + q_len), slice(k_at, k_at + k_len)
            q_at, k_at = q_at + q_len, k_at + k_len

    def call(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """(out (total, H, D), S_dmask, lse, gradients of q, k and v), through the form of the case."""
        case = self.case
        leaves = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
        q, k, v = leaves if self.varlen else (x.unflatten(0, (self.batch, -1)) for x in leaves)
        last = {
            "dropout_p": case.dropout_p, "causal": case.causal, "window_size": case.window,
            "softcap": case.softcap, "alibi_slopes": self.slopes, "return_attn_probs": True,
        }  # fmt: skip
        starts = [
            torch.tensor(np.cumsum([0, *lens]), dtype=torch.int32) for lens in (self.q_lens, self.k_lens)
        ]
        longest = (max(self.q_lens), max(self.k_lens))
        read = None
        torch.manual_seed(case.seed)
        if case.form == "dense":
            found = flash_attn.flash_attn_func(q, k, v, **last)
        elif case.form == "kvpacked":
            found = flash_attn.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **last)
        elif case.form == "qkvpacked":
            found = flash_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **last)
        elif case.form == "varlen":
            found = flash_attn.flash_attn_varlen_func(q, k, v, *starts, *longest, **last)
        elif case.form == "varlen kvpacked":
            kv = torch.stack((k, v), 1)
            found = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *starts, *longest, **last)
        elif case.form == "varlen paged":
            found, read = self._over_pages((*leaves, *starts, *longest), last)
        else:
            qkv = torch.stack((q, k, v), 1)
            found = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, starts[0], longest[0], **last)
        out, lse, s_dmask = found
        grads = torch.autograd.grad(out, leaves, self.dout.view_as(out))
        out = out.detach() if read is None else read
        return out.reshape(self.q.shape), s_dmask, lse.detach(), list(grads)

    def _over_pages(self, call: Any, last: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """The results with k and v in pages that lie in no order; and out of a call that needs no gradients,
        which reads them there."""
        q, k, v, *lengths = call
        page = (1, 16, 256)[self.case.seed % 3]
        each = [-(-n // page) for n in self.k_lens]
        order = torch.randperm(sum(each))
        table = torch.full((self.batch, max(each)), -1, dtype=torch.int32)
        row = []
        for (b, _, at), pages in zip(self.parts(), order.split(each), strict=True):
            table[b, : len(pages)] = pages
            slot = torch.arange(at.stop - at.start)
            row.append(pages[slot // page] * page + slot % page)
        shape = (sum(each) * page, *k.shape[1:])
        k, v = (
            x.new_full(shape, torch.nan).index_copy(0, torch.cat(row), x).unflatten(0, (-1, page))
            for x in (k, v)
        )
        last["block_table"] = table
        found = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, **last)
        if self.case.dropout_p:
            return found, None
        with torch.no_grad():
            last["return_attn_probs"] = False
            return found, flash_attn.flash_attn_varlen_func(q, k, v, *lengths, **last)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_error_is_at_most_that_of_plain_attention(case: Case) -> None:
    given = Sequences(case)
    out, s_dmask, lse, (dq, dk, dv) = given.call()
    worst = dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
    wanted = [np.zeros(x.shape, plain.Wide) for x in (given.q, given.q, given.k, given.v)]
    zeros = [torch.zeros_like(x) for x in (given.q, given.q, given.k, given.v)]
    orders = 2 if case.dtype in (torch.float32, torch.float64) else 1
    plains = [[x.clone() for x in zeros] for _ in range(orders)]
    for b, rows, keys in given.parts():
        q, k, v, dout = given.q[rows], given.k[keys], given.v[keys], given.dout[rows]
        kept = None
        if case.dropout_p:
            kept = ~torch.signbit(s_dmask[b, :, : q.shape[0], : k.shape[0]]).numpy()
        slopes = None if given.slopes is None else given.slopes[b].numpy()
        formula = plain.Formula(
            case.dim**-0.5, case.causal, case.window, case.softcap, slopes, case.dropout_p, kept
        )
        *true, true_lse = plain.truth(*map(plain.as_numpy, (q, k, v, dout)), formula)
        found = plain.in_dtype(q, k, v, dout, formula)
        for i, at in enumerate((rows, rows, keys, keys)):
            wanted[i][at] = true[i]
            for order in range(orders):
                plains[order][i][at] = found[order][i]
        _check_lse(case, lse[b] if lse.ndim == 3 else lse[:, rows], true_lse, slopes, k.shape[0])
    for i, (name, got) in enumerate(zip(worst, (out, dq, dk, dv), strict=True)):
        factor = FORWARD if name == "out" else GRADIENT
        worst[name] = plain.excess(got, wanted[i], [pt[i] for pt in plains], factor)
    assert max(worst.values()) <= 1, worst


def _check_lse(case: Case, got: Tensor, wanted: np.ndarray, slopes: np.ndarray | None, keys: int) -> None:
    """In flash_attn's conventions, within the noise of its own dtype."""
    rows = wanted.shape[1]
    left, right = case.window
    if slopes is not None and (case.causal or right == 0) and (left < 0 or left >= max(case.lengths)):
        wanted = wanted + slopes[:, None].astype(plain.Wide) * (np.arange(rows) + keys - rows)
    empty = wanted == -np.inf
    assert (plain.as_numpy(got)[empty] == np.inf).all()
    if (~empty).any():
        # Scores are sums of `dim` products, of which each may be rounded once.
        bound = case.dim * torch.finfo(got.dtype).eps * max(1.0, float(np.abs(wanted[~empty]).max()))
        assert np.abs(plain.as_numpy(got)[~empty] - wanted[~empty]).max() <= bound


def test_share_of_dropped_elements() -> None:
    """Within 0.01 of the chance, which is flash_attn's bound."""
    q = torch.randn(2, 256, 4, 32)
    for p in (0.05, 0.17, 0.5):
        torch.manual_seed(0)
        *_, s_dmask = flash_attn.flash_attn_func(q, q, q, p, return_attn_probs=True)
        assert abs(float(torch.signbit(s_dmask).double().mean()) - p) < 0.01


def test_dropout_follows_torch_manual_seed() -> None:
    q = torch.randn(1, 64, 2, 32)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(flash_attn.flash_attn_func(q, q, q, 0.3))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
