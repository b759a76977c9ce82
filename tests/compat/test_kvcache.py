"""`flash_attn_with_kvcache` of generations 2 and 3, over flash_attn's own axes and by its rule.

The error is at most three times that of plain attention in the same dtype, five times with ALiBi. The cases
are a fixed sample of all combinations.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anyflash.compat import flash_attn_interface as generation3
from anyflash.compat.flash_attn import flash_attn_with_kvcache
from anyflash.compat.flash_attn.ops.triton.rotary import apply_rotary
from compat import plain

CASES = 48
FACTOR, FACTOR_ALIBI = 3.0, 5.0
BATCH, CAPACITY = 3, 64

AXES: dict[str, tuple[Any, ...]] = {
    "generation": (2, 2, 3),
    "dtype": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "dim": (32, 59, 64, 128, 256),
    "heads": ((6, 6), (6, 1), (6, 2)),
    "rows": (1, 1, 3, 17),
    "new": (None, "as rows", "as rows", 5),
    "causal": (False, True, True),
    "window": ((-1, -1), (-1, -1), (9, 2)),
    "alibi": (False, False, True),
    "softcap": (0.0, 0.0, 20.0),
    "rotary": (None, None, "halves", "neighbours", "half of the head"),
    "place": ("rows", "batch index", "left padding", "pages of 1", "pages of 16", "pages of 256"),
    "lengths": ("each", "one number"),
}


@dataclass(frozen=True)
class Case:
    generation: int
    dtype: torch.dtype
    dim: int
    heads: tuple[int, int]
    rows: int
    new: Any
    causal: bool
    window: tuple[int, int]
    alibi: bool
    softcap: float
    rotary: str | None
    place: str
    lengths: str
    seed: int

    def __str__(self) -> str:
        said = [str(getattr(self, f.name)).removeprefix("torch.") for f in fields(self)]
        return "-".join(said).replace(" ", "")


def sample() -> list[Case]:
    rng = random.Random(20230717)
    columns = {}
    for name, values in AXES.items():
        columns[name] = [values[i % len(values)] for i in range(CASES)]
        rng.shuffle(columns[name])
    return [Case(**{name: column[i] for name, column in columns.items()}, seed=i) for i in range(CASES)]


class Cache:
    """Random keys and values of each sequence, laid out as the case says. Slots without a key hold NaN."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        heads, heads_k = case.heads
        normal = lambda *shape: torch.randn(*shape, case.dim, dtype=torch.float64).to(case.dtype)
        self.q = normal(BATCH, case.rows, heads)
        self.count = case.rows if case.new == "as rows" else case.new or 0
        self.new = [normal(BATCH, self.count, heads_k) for _ in range(2)]
        limit = CAPACITY - self.count
        self.lens = [limit] * BATCH if case.lengths == "one number" else [limit, 20, 31]
        self.pad = [0, 7, 30] if case.place == "left padding" else [0] * BATCH
        self.keys = [
            [normal(n - p, heads_k) for _ in range(2)] for n, p in zip(self.lens, self.pad, strict=True)
        ]
        self.arguments: dict[str, Any] = {}
        if case.place.startswith("pages"):
            self._pages(case, int(case.place.rpartition(" ")[2]))
        else:
            self._rows(case)
        seqlens = torch.tensor(self.lens, dtype=torch.int32)
        self.arguments["cache_seqlens"] = self.lens[0] if case.lengths == "one number" else seqlens
        if case.alibi and case.generation == 2:
            self.arguments["alibi_slopes"] = torch.rand(BATCH, heads) * 0.3
        self.angles = None
        if case.rotary and self.count:
            n = case.dim // 2 // (2 if case.rotary.startswith("half of") else 1)
            self.angles = torch.rand(CAPACITY + 256, n, dtype=torch.float64) * 6
            self.arguments["rotary_cos"] = self.angles.cos().to(case.dtype)
            self.arguments["rotary_sin"] = self.angles.sin().to(case.dtype)
            self.arguments["rotary_interleaved"] = case.rotary == "neighbours"

    def _rows(self, case: Case) -> None:
        entry = [4, 1, 2] if case.place == "batch index" else range(BATCH)
        self.arrays = [
            torch.full((5, CAPACITY, case.heads[1], case.dim), torch.nan, dtype=case.dtype) for _ in "kv"
        ]
        if case.place == "batch index":
            self.arguments["cache_batch_idx"] = torch.tensor(list(entry), dtype=torch.int32)
        if case.place == "left padding":
            self.arguments["cache_leftpad"] = torch.tensor(self.pad, dtype=torch.int32)
        for b, row in enumerate(entry):
            for array, x in zip(self.arrays, self.keys[b], strict=True):
                array[row, self.pad[b] : self.lens[b]] = x
        self.slots = lambda array, b, a, z: array[entry[b], a:z]

    def _pages(self, case: Case, page: int) -> None:
        each = -(-CAPACITY // page)
        table = torch.randperm(BATCH * each + 2)[: BATCH * each].reshape(BATCH, each)
        shape = (BATCH * each + 2, page, case.heads[1], case.dim)
        self.arrays = [torch.full(shape, torch.nan, dtype=case.dtype) for _ in "kv"]
        name = "block_table" if case.generation == 2 else "page_table"
        self.arguments[name] = table.to(torch.int32)
        for b in range(BATCH):
            for array, x in zip(self.arrays, self.keys[b], strict=True):
                slot = torch.arange(self.lens[b])
                array[table[b, slot // page], slot % page] = x

        def slots(array: Tensor, b: int, a: int, z: int) -> Tensor:
            slot = torch.arange(a, z)
            return array[table[b, slot // page], slot % page]

        self.slots: Callable[[Tensor, int, int, int], Tensor] = slots


SAMPLE = sample()


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_error_is_at_most_that_of_plain_attention(case: Case) -> None:
    cache = Cache(case)
    before = [array.clone() for array in cache.arrays]
    call = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap, **cache.arguments}
    function = flash_attn_with_kvcache if case.generation == 2 else generation3.flash_attn_with_kvcache
    new = cache.new if cache.count else (None, None)
    out, lse, *_ = function(cache.q, *cache.arrays, *new, return_softmax_lse=True, **call)
    assert lse.shape == (BATCH, case.heads[0], case.rows)

    wanted, pt = np.zeros(out.shape, plain.Wide), torch.zeros_like(out)
    slopes = call.get("alibi_slopes")
    for b in range(BATCH):
        first = cache.lens[b]
        q, keys, values = cache.q[b], *(x[b] for x in cache.new)
        if cache.angles is not None:
            each = case.causal or case.window != (-1, -1)
            q = _turned(q, call, first + torch.arange(case.rows) * each)
            keys = _turned(keys, call, first + torch.arange(cache.count))
        appended = [cache.slots(array, b, first, first + cache.count) for array in cache.arrays]
        torch.testing.assert_close(appended[0], keys)
        assert torch.equal(appended[1], values)
        k, v = (torch.cat(pair) for pair in zip(cache.keys[b], (keys, values), strict=True))
        formula = plain.Formula(
            case.dim**-0.5, case.causal, case.window, case.softcap,
            None if slopes is None else slopes[b].numpy(),
        )  # fmt: skip
        wanted[b] = plain.truth(*map(plain.as_numpy, (q, k, v, q)), formula)[0]
        pt[b] = plain.forward(q, k, v, formula)
    factor = FACTOR if slopes is None else FACTOR_ALIBI
    assert plain.excess(out, wanted, [pt], factor) <= 1
    for array, old in zip(cache.arrays, before, strict=True):
        untouched = int(torch.isfinite(old).sum()) + cache.count * BATCH * case.heads[1] * case.dim
        assert int(torch.isfinite(array).sum()) == untouched


def _turned(x: Tensor, call: dict[str, Any], positions: Tensor) -> Tensor:
    """Rows of x, each turned at its position."""
    tables = (call["rotary_cos"], call["rotary_sin"])
    rows = [
        apply_rotary(x[None, i : i + 1], *tables, int(at), interleaved=call["rotary_interleaved"])[0]
        for i, at in enumerate(positions)
    ]
    return torch.cat(rows) if rows else x


def test_sample_has_every_value() -> None:
    for name, values in AXES.items():
        assert {getattr(case, name) for case in SAMPLE} == set(values), name


def test_lse_in_the_conventions_of_each_generation() -> None:
    """Two keys and four causal queries: the first two see nothing. ALiBi by the causal kernel's formula."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 16, dtype=torch.float64) for n in (4, 8, 8))
    _, lse = flash_attn_with_kvcache(q, k, v, cache_seqlens=2, causal=True, return_softmax_lse=True)
    _, lse3, *_ = generation3.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=2, causal=True, return_softmax_lse=True
    )
    assert (lse[..., :2] == torch.inf).all()
    assert (lse3[..., :2] == -torch.inf).all()
    assert torch.equal(lse[..., 2:], lse3[..., 2:])
    slopes, lens = torch.tensor([0.5, 0.25]), torch.tensor([5, 8], dtype=torch.int32)
    call = {"cache_seqlens": lens, "causal": True, "alibi_slopes": slopes, "return_softmax_lse": True}
    _, lse = flash_attn_with_kvcache(q, k, v, **call)
    for b, n in enumerate(lens.tolist()):
        s = torch.einsum("ihd,jhd->hij", q[b], k[b, :n]) * 0.25 + slopes[:, None, None] * torch.arange(n)
        seen = torch.from_numpy(plain.seen(4, n, True, (-1, -1)))
        torch.testing.assert_close(lse[b], s.masked_fill(~seen, -torch.inf).logsumexp(-1))


def test_packed_queries_of_generation_3() -> None:
    """cu_seqlens_q, cu_seqlens_k_new and rotary_seqlens, against the dense call of each sequence."""
    torch.manual_seed(0)
    heads, dim = 2, 16
    cache = [torch.randn(2, 12, heads, dim, dtype=torch.float64) for _ in "kv"]
    lens, rows, first = [4, 7], [3, 1], [9, 2]
    starts = torch.tensor([0, 3, 4], dtype=torch.int32)
    q, k, v = (torch.randn(4, heads, dim, dtype=torch.float64) for _ in range(3))
    angles = torch.rand(40, dim // 2, dtype=torch.float64)
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "causal": True}
    mine = [x.clone() for x in cache]
    call = {
        "cache_seqlens": torch.tensor(lens, dtype=torch.int32), "cu_seqlens_q": starts,
        "cu_seqlens_k_new": starts, "max_seqlen_q": 3,
        "rotary_seqlens": torch.tensor(first, dtype=torch.int32), **tables,
    }  # fmt: skip
    out = generation3.flash_attn_with_kvcache(q, *mine, k, v, **call)
    for b in range(2):
        at = slice(int(starts[b]), int(starts[b + 1]))
        turn = lambda x, b=b, at=at: apply_rotary(
            x[None, at], angles.cos(), angles.sin(), first[b], interleaved=True
        )
        alone = [x[b : b + 1].clone() for x in cache]
        wanted = flash_attn_with_kvcache(
            turn(q), *alone, turn(k), v[None, at], cache_seqlens=lens[b], causal=True
        )
        torch.testing.assert_close(out[at], wanted[0])
        end = lens[b] + rows[b]
        for got, want in zip(mine, alone, strict=True):
            torch.testing.assert_close(got[b, :end], want[0, :end])


def test_generation_of_a_layer() -> None:
    """MHA with its cache gives, token by token, what it gives at once; windows and ALiBi included."""
    from anyflash.compat.flash_attn.modules.mha import MHA
    from anyflash.compat.flash_attn.utils.generation import InferenceParams

    torch.manual_seed(0)
    for options in (
        {"use_flash_attn": True, "num_heads_kv": 2, "rotary_emb_dim": 16, "window_size": (6, 0)},
        {"use_flash_attn": True, "use_alibi": True},
        {"rotary_emb_dim": 8},
    ):
        layer = MHA(64, 4, causal=True, layer_idx=0, dtype=torch.float64, **options).eval()
        x = torch.randn(2, 14, 64, dtype=torch.float64)
        state = InferenceParams(max_seqlen=14, max_batch_size=2)
        found = []
        with torch.no_grad():
            for a, z in ((0, 5), (5, 6), (6, 9), *((i, i + 1) for i in range(9, 14))):
                found.append(layer(x[:, a:z], inference_params=state))
                state.seqlen_offset = z
            torch.testing.assert_close(torch.cat(found, 1), layer(x))
