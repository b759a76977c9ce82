"""PagedCache against a model of it that keeps every sequence in arrays of its own."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
import torch

import anyflash as af
from anyflash.kvcache import attention, paged
from anyflash.kvcache.paged import PagedCache

LAYERS, HEADS, D, DV = 2, 2, 4, 3


def empty(num_pages: int = 12, page_size: int = 4, like: Any = None) -> PagedCache:
    return PagedCache(
        np.zeros(0, np.float32) if like is None else like,
        layers=LAYERS,
        num_pages=num_pages,
        page_size=page_size,
        heads_kv=HEADS,
        head_dim=D,
        head_dim_v=DV,
    )


class Server:
    """A PagedCache and, for every sequence, the keys and values that it must hold."""

    def __init__(self, cache: PagedCache, seed: int) -> None:
        self.cache, self.rng = cache, np.random.default_rng(seed)
        self.cache.k[...], self.cache.v[...] = np.nan, np.nan
        self.held: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.leftpad: dict[int, int] = {}

    def add(self, sequence: int, held: tuple[np.ndarray, np.ndarray], leftpad: int = 0) -> None:
        self.held[sequence], self.leftpad[sequence] = held, leftpad

    def allocate(self) -> None:
        nothing = tuple(np.zeros((LAYERS, 0, HEADS, d), np.float32) for d in (D, DV))
        self.add(self.cache.allocate(), nothing)  # type: ignore[arg-type]

    def fork(self, sequence: int) -> None:
        length = int(self.rng.integers(self.leftpad[sequence], self.cache.length(sequence) + 1))
        child = self.cache.fork(sequence, length)
        self.add(child, tuple(x[:, :length] for x in self.held[sequence]), self.leftpad[sequence])  # type: ignore[arg-type]

    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        del self.held[sequence], self.leftpad[sequence]

    def truncate(self, sequence: int) -> None:
        length = int(self.rng.integers(self.leftpad[sequence], self.cache.length(sequence) + 1))
        self.cache.truncate(sequence, length)
        self.held[sequence] = tuple(x[:, :length] for x in self.held[sequence])  # type: ignore[assignment]

    def keep(self, sequence: int) -> None:
        end = self.cache.length(sequence)
        length = int(self.rng.integers(self.leftpad[sequence], end + 1))
        slots = [slot for slot in range(length, end) if self.rng.random() < 0.5]
        before = self.state()
        try:
            self.cache.keep(sequence, length, slots)
        except af.InvalidCall as full:
            if full.argument != "slots" or self.state() != before:
                raise
            return
        kept = [*range(length), *slots]
        self.held[sequence] = tuple(x[:, kept] for x in self.held[sequence])  # type: ignore[assignment]

    def forget(self, sequence: int) -> None:
        tokens = int(self.rng.integers(self.leftpad[sequence], self.cache.length(sequence) + 1))
        self.cache.forget(sequence, tokens)
        self.leftpad[sequence] = tokens

    def append(self, sequences: list[int]) -> None:
        """New tokens for each layer, by attention over the batch; its results are checked too."""
        counts = self.rng.integers(0, 6, len(sequences)).tolist()
        free, needed = self.cache.free_pages, self.cache.pages_needed(sequences, counts)
        if needed > free:
            before = self.state()
            with pytest.raises(af.InvalidCall, match=r"^tokens: "):
                self.cache.append(sequences, counts)
            assert self.state() == before
            return
        batch = self.cache.append(sequences, counts)
        assert self.cache.free_pages == free - needed
        new = [self.rng.standard_normal((LAYERS, sum(counts), HEADS, d)).astype(np.float32) for d in (D, DV)]
        q = self.rng.standard_normal((sum(counts), 2 * HEADS, D)).astype(np.float32)
        ends = np.cumsum([0, *counts])
        for i, sequence in enumerate(sequences):
            mine = slice(ends[i], ends[i + 1])
            grown = zip(self.held[sequence], new, strict=True)
            self.held[sequence] = tuple(np.concatenate([x, y[:, mine]], axis=1) for x, y in grown)  # type: ignore[assignment]
        for layer in range(LAYERS):
            out = af.attention_kvcache(
                q,
                batch[layer],
                new[0][layer],
                new[1][layer],
                cu_seqlens_q=batch.cu_seqlens,
                causal=True,
                backend="reference",
            )
            for i, sequence in enumerate(sequences):
                mine, first = slice(ends[i], ends[i + 1]), self.leftpad[sequence]
                k, v = (x[None, layer, first:] for x in self.held[sequence])
                alone = af.attention(q[None, mine], k, v, causal=True, backend="reference")[0]
                assert np.allclose(out[mine], alone, rtol=1e-5, atol=1e-6)

    def state(self) -> Any:
        lengths = {sequence: self.cache.length(sequence) for sequence in self.held}
        return self.cache.memory(), lengths, self.cache.k.tobytes(), self.cache.v.tobytes()

    def check(self) -> None:
        cache, size = self.cache, self.cache.page_size
        pages: dict[int, set[int]] = {}
        for sequence, (k, v) in self.held.items():
            batch, first = cache.view([sequence]), self.leftpad[sequence]
            length = int(batch.seqlens[0])
            assert length == cache.length(sequence) == k.shape[1]
            slots = np.arange(first, length)
            where = batch.block_table[0][slots // size], slots % size
            assert (cache.k[:, *where] == k[:, first:]).all()
            assert (cache.v[:, *where] == v[:, first:]).all()
            held = batch.block_table[0][first // size : -(-length // size)]
            pages[sequence] = set(held.tolist())
        found = cache.memory()
        used = set().union(*pages.values())
        assert found.pages - found.free_pages == len(used)
        assert found.shared_pages == sum(sum(p in mine for mine in pages.values()) > 1 for p in used)
        assert found.bytes_used * found.pages == found.bytes * len(used)
        assert found.bytes == cache.k.nbytes + cache.v.nbytes
        assert found.tokens == sum(x.shape[1] - self.leftpad[s] for s, (x, _) in self.held.items())


@pytest.mark.parametrize("page_size", [1, 4, 50])
@pytest.mark.parametrize("seed", range(2))
def test_against_the_model(page_size, seed):
    """A few hundred random operations; the cache runs full now and then."""
    server = Server(empty(num_pages={1: 60, 4: 16, 50: 5}[page_size], page_size=page_size), seed)
    for _ in range(100):
        sequences = list(server.held)
        what = server.rng.choice(
            ["allocate", "append", "append", "append", "fork", "truncate", "keep", "forget", "free"]
        )
        if what == "allocate" or not sequences:
            server.allocate()
        elif what == "append":
            count = int(server.rng.integers(1, len(sequences) + 1))
            server.append(server.rng.permutation(sequences)[:count].tolist())
        else:
            getattr(server, what)(int(server.rng.choice(sequences)))
        server.check()
    for sequence in list(server.held):
        server.free(sequence)
    assert server.cache.memory()[1:] == (0, *[server.cache.memory().pages] * 2, 0, 0, 0)


def test_fork_takes_a_page_when_it_is_written():
    cache = empty()
    a = cache.allocate()
    cache.append([a], 6)
    b = cache.fork(a)
    assert cache.memory().shared_pages == 2
    assert cache.free_pages == 10
    assert cache.pages_needed([a, b], 1) == 1  # one of them copies the half page, the other keeps it
    cache.append([b], 1)
    assert cache.memory().shared_pages == 1
    cache.append([a], 1)
    assert cache.free_pages == 9


def test_forking_at_a_page_copies_nothing():
    cache = empty()
    a = cache.allocate()
    cache.append([a], 8)
    b = cache.fork(a)
    assert cache.pages_needed([b], 4) == 1
    cache.append([b], 4)
    assert cache.memory().shared_pages == 2


def test_torch():
    like = torch.zeros((), dtype=torch.bfloat16)
    cache = empty(like=like)
    a = cache.allocate()
    batch = cache.append([a], 5)
    new = [torch.randn(1, 5, HEADS, d, dtype=torch.bfloat16) for d in (D, DV)]
    out = af.attention_kvcache(new[0], batch[1], *new, causal=True, backend="reference")
    assert out.dtype == torch.bfloat16
    assert batch.seqlens.dtype == torch.int32
    b = cache.fork(a)
    cache.append([b], 1)
    table = cache.view([a, b]).block_table
    assert table[0, 1] != table[1, 1]
    assert torch.equal(cache.k[1, table[0, 1], :1], cache.k[1, table[1, 1], :1])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda c, a: c.append([a], 100),
            "tokens: 100 for 1 sequences, which takes 25 pages; expected at most 11",
        ),
        (lambda c, a: c.append([a, a], 1), "sequences: [1, 1]; expected each of them once"),
        (
            lambda c, a: c.append([a], [1, 2]),
            "tokens: [1, 2]; expected a number of at least 0, or 1, one a seq",
        ),
        (lambda c, a: c.append([a], -1), "tokens: -1; expected a number of at least 0"),
        (lambda c, a: c.append([7], 1), "sequence: 7; expected a number from allocate() or fork()"),
        (lambda c, a: c.view([7]), "sequence: 7; expected"),
        (lambda c, a: c.free(7), "sequence: 7; expected"),
        (lambda c, a: c.fork(a, 4), "length: 4; expected 1 to 3"),
        (lambda c, a: c.truncate(a, 0), "length: 0; expected 1 to 3"),
        (lambda c, a: c.forget(a, 4), "tokens: 4; expected 1 to 3"),
        (lambda c, a: c.keep(a, 0, []), "length: 0; expected 1 to 3"),
        (lambda c, a: c.keep(a, 1, [2, 1]), "slots: [2, 1]; expected ascending, 1 to 2"),
        (lambda c, a: c.keep(a, 2, [1]), "slots: [1]; expected ascending, 2 to 2"),
        (lambda c, a: c.keep(a, 1, [3]), "slots: [3]; expected ascending, 1 to 2"),
        (lambda c, a: empty(num_pages=0), "num_pages: 0; expected a whole number of at least 1"),
        (lambda c, a: empty(like=np.zeros(1, int)), "like: dtype int64; expected one of float16"),
        (lambda c, a: empty(like=[1.0]), "like: type list; expected"),
    ],
)
def test_errors(call, said):
    cache = empty()
    a = cache.allocate()
    cache.append([a], 3)
    cache.forget(a, 1)
    before = cache.memory()
    with pytest.raises(af.InvalidCall) as caught:
        call(cache, a)
    assert str(caught.value).startswith(said)
    assert cache.memory() == before


@pytest.mark.parametrize("module", [attention, paged])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
