"""Lengths, page tables and tokens that lie on a GPU: nothing waits for them, and what was recorded in a CUDA
graph runs again with others. `make verify` runs this file where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="needs triton, which torch for CUDA brings")

import numpy as np
import torch

import anyflash as af
from anyflash.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from anyflash.kvcache import PagedCache

DEVICE = "cuda"
HEADS, KV_HEADS, DIM = 8, 2, 64
TOTAL_Q, TOTAL_K = 640, 900
# Of the packed rows of q and of k; the last rows belong to none.
LENGTHS = (
    ((100, 1, 0, 300, 77), (100, 60, 5, 411, 200)),
    ((0, 500, 13, 2, 120), (3, 700, 13, 90, 94)),
)
PAGE, COLUMNS, PAGES = 16, 24, 130

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU: make verify on a machine with one"
    ),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """A call that makes the host wait for the device is an error. Kernels must have been compiled."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(call: Callable[[], Any], change: Callable[[], None]) -> Any:
    """What `call` gives when it is recorded, `change` alters its inputs, and the record is run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # Kernels are compiled outside of a recording.
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    change()
    graph.replay()
    torch.cuda.synchronize()
    return results


def integers(values: Any, dtype: Any = torch.int32) -> Any:
    return torch.tensor(np.asarray(values), dtype=dtype, device=DEVICE)


def random(*shape: int, seed: int = 0) -> Any:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(torch.bfloat16).to(DEVICE)


def close(found: Any, wanted: Any) -> None:
    """As two orders of the same sum in bfloat16 may differ."""
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    assert (found - wanted).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()


def starts(which: int, side: int, dtype: Any = torch.int32) -> Any:
    return integers(np.cumsum([0, *LENGTHS[which][side]]), dtype)


def packed() -> tuple[Any, ...]:
    shapes = (TOTAL_Q, HEADS, DIM), (TOTAL_K, KV_HEADS, DIM), (TOTAL_K, KV_HEADS, DIM)
    return tuple(random(*shape, seed=i) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_gradients(dtype: Any) -> None:
    """As on the CPU, and nobody waits."""

    def gradients(device: str, **keywords: Any) -> Any:
        inputs = [x.to(device).requires_grad_() for x in packed()]
        lengths = [starts(0, side, dtype).to(device) for side in (0, 1)]
        dout = random(TOTAL_Q, HEADS, DIM, seed=5).to(device)

        def run() -> Any:
            out = af.attention_varlen(
                *inputs, cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1], causal=True, **keywords
            )
            return out, *torch.autograd.grad(out, inputs, dout)

        if device == "cpu":
            return run()
        run()
        with no_waiting():
            return run()

    for found, wanted in zip(gradients(DEVICE), gradients("cpu"), strict=True):
        close(found, wanted)


def test_packed_call_in_a_graph() -> None:
    q, k, v = packed()
    cu_q, cu_k = starts(0, 0), starts(0, 1)

    def call() -> Any:
        return af.attention_varlen(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, return_lse=True
        )

    def change() -> None:
        cu_q.copy_(starts(1, 0))
        cu_k.copy_(starts(1, 1))
        q.copy_(random(*q.shape, seed=9))

    found = replayed(call, change)
    for mine, eager in zip(found, call(), strict=True):
        assert torch.equal(mine, eager)


class Serving:
    """A step of a server: new tokens of three sequences, turned, written into pages, attended."""

    LENS = ((5, 300, 0), (64, 17, 330))

    def __init__(self, tokens: int) -> None:
        self.cache_k, self.cache_v = (random(PAGES, PAGE, KV_HEADS, DIM, seed=i) for i in (1, 2))
        angle = torch.arange(PAGE * COLUMNS)[:, None] / 1e4 ** (torch.arange(DIM // 2) / (DIM // 2))
        self.cos, self.sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
        self.q, self.k, self.v = (random(3, tokens, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
        self.seqlens, self.table = integers(self.LENS[0]), integers(np.zeros((3, COLUMNS)))
        self.set(0)

    def set(self, step: int) -> None:
        """Other lengths, pages and tokens, in place."""
        order = np.random.default_rng(step).permutation(PAGES)[: 3 * COLUMNS]
        self.table.copy_(integers(order.reshape(3, COLUMNS)))
        self.seqlens.copy_(integers(self.LENS[step]))
        for i, tensor in enumerate((self.q, self.k, self.v)):
            tensor.copy_(random(*tensor.shape, seed=10 * step + i))

    def call(self, **keywords: Any) -> Any:
        cache = af.KVCache(self.cache_k, self.cache_v, self.seqlens, self.table)
        return af.attention_kvcache(
            self.q,
            cache,
            self.k,
            self.v,
            causal=True,
            rotary=(self.cos, self.sin),
            return_lse=True,
            **keywords,
        )

    def on_host(self) -> Serving:
        made = object.__new__(Serving)
        made.__dict__ = {name: tensor.cpu() for name, tensor in self.__dict__.items()}
        return made


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_cache_call_is_the_hosts(tokens: int) -> None:
    step = Serving(tokens)
    step.call()
    step.set(1)
    host = step.on_host()
    with no_waiting():
        out, lse = step.call()
    wanted_out, wanted_lse = host.call()
    close(out, wanted_out)
    close(lse, wanted_lse)
    close(step.cache_k, host.cache_k)
    assert torch.equal(step.cache_v.cpu(), host.cache_v)


@pytest.mark.parametrize("tokens", [1, 4])
def test_cache_call_in_a_graph(tokens: int) -> None:
    recorded, eager = Serving(tokens), Serving(tokens)
    found = replayed(recorded.call, lambda: recorded.set(1))
    # The same writes: those of step 0 were made when kernels were compiled, a recording makes none.
    eager.call()
    eager.set(1)
    wanted = eager.call()
    for mine, other in zip(found, wanted, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(recorded.cache_k, eager.cache_k)
    assert torch.equal(recorded.cache_v, eager.cache_v)


def test_wrong_integers_write_nothing_outside() -> None:
    """The cache is the middle of a larger tensor, of which the rest must stay."""
    step = Serving(2)
    shape = (PAGES + 40, *step.cache_k.shape[1:])
    whole = [torch.full(shape, 7.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    step.cache_k, step.cache_v = (x[20:-20] for x in whole)
    for lens, pages in (((PAGE * COLUMNS, 10**9, -5), 0), ((0, 40, 90), 10**8), ((0, 40, 90), -(10**8))):
        step.seqlens.copy_(integers(lens))
        if pages:
            step.table.fill_(pages)
        step.call()
    torch.cuda.synchronize()
    for x in whole:
        assert (x[:20] == 7).all()
        assert (x[-20:] == 7).all()


def test_paged_cache() -> None:
    """The same steps here and in host memory."""
    new = random(1, 30, KV_HEADS, DIM)
    step = random(2, 1, KV_HEADS, DIM, seed=1)

    def run(device: str) -> Any:
        tokens, next_tokens = new.to(device), step.to(device)
        cache = PagedCache(tokens, layers=1, num_pages=8, page_size=16, heads_kv=KV_HEADS, head_dim=DIM)
        prompt = cache.allocate()
        af.attention_kvcache(tokens, cache.append([prompt], 30)[0], tokens, tokens, causal=True)
        other = cache.fork(prompt)
        batch = cache.append([prompt, other], 1)
        return af.attention_kvcache(next_tokens, batch[0], next_tokens, next_tokens, causal=True)

    close(run(DEVICE), run("cpu"))


def test_the_door_of_flash_attn_waits_for_nothing() -> None:
    step, (q, k, v) = Serving(1), packed()
    cu_q, cu_k, ones = starts(0, 0), starts(0, 1), integers([0, 1, 2, 3])

    def calls() -> None:
        flash_attn_with_kvcache(
            step.q, step.cache_k, step.cache_v, step.k, step.v, cache_seqlens=step.seqlens,
            block_table=step.table, causal=True,
        )  # fmt: skip
        flash_attn_varlen_func(q, k, v, cu_q, cu_k, TOTAL_Q, TOTAL_K, causal=True)
        flash_attn_varlen_func(
            step.q[:, 0], step.cache_k, step.cache_v, ones, cu_k[:4], 1, TOTAL_K, block_table=step.table
        )

    calls()
    with no_waiting():
        calls()
