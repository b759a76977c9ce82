"""What a small server does, end to end: a model of two attention layers whose tokens depend on everything
before them, served in batches, in chunks, by speculation and with shared prefixes, gives the tokens that it
gives alone and from scratch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anyflash as af
from anyflash.contract.backends import present
from anyflash.core.errors import Unsupported
from anyflash.kvcache import PagedCache

WORDS, HEADS, HEADS_KV, D, LAYERS, LONGEST = 40, 4, 2, 16, 2, 96
WIDTH = HEADS * D


class Model:
    """Random weights; positions enter by rotary embedding alone."""

    def __init__(self, backend: str) -> None:
        r = np.random.default_rng(3)
        make = lambda *shape: (r.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        self.words = make(WORDS, WIDTH) * np.sqrt(WORDS).astype(np.float32)
        self.to_q = [make(WIDTH, WIDTH) for _ in range(LAYERS)]
        self.to_k = [make(WIDTH, HEADS_KV * D) for _ in range(LAYERS)]
        self.to_v = [make(WIDTH, HEADS_KV * D) for _ in range(LAYERS)]
        self.to_words = make(WIDTH, WORDS)
        angle = np.arange(LONGEST)[:, None] / 100 ** (np.arange(D // 2) / (D // 2))
        self.rotary = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        self.backend = backend

    def step(self, tokens: Any, batch: Any, **keywords: Any) -> np.ndarray:
        """The next word after each of the packed new tokens, which join the cache."""
        x = self.words[np.asarray(tokens)]
        for layer in range(LAYERS):
            q, k, v = (x @ w[layer] for w in (self.to_q, self.to_k, self.to_v))
            out = af.attention_kvcache(
                q.reshape(-1, HEADS, D),
                batch[layer],
                k.reshape(-1, HEADS_KV, D),
                v.reshape(-1, HEADS_KV, D),
                cu_seqlens_q=batch.cu_seqlens,
                rotary=self.rotary,
                backend=self.backend,
                **({"causal": True} | keywords),
            )
            x = x + out.reshape(-1, WIDTH)
        return (x @ self.to_words).argmax(axis=1)

    def cache(self, num_pages: int = 80, page_size: int = 4) -> PagedCache:
        return PagedCache(
            self.words, layers=LAYERS, num_pages=num_pages, page_size=page_size, heads_kv=HEADS_KV, head_dim=D
        )

    def alone(self, prompt: list[int], count: int) -> list[int]:
        """`count` words after the prompt, each from the whole text anew."""
        text = list(prompt)
        for _ in range(count):
            cache = self.cache(num_pages=1, page_size=LONGEST)
            text.append(int(self.step(text, cache.append([cache.allocate()], len(text)))[-1]))
        return text[len(prompt) :]


@pytest.fixture(params=present())
def model(request: pytest.FixtureRequest) -> Model:
    made = Model(request.param)
    cache = made.cache()
    try:
        made.step([1], cache.append([cache.allocate()], 1))
    except Unsupported as why:
        pytest.skip(str(why))
    return made


PROMPTS = [[5, 7, 11], [1] * 17, [2], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [30, 31, 32, 33, 34, 35]]


def test_continuous_batching(model):
    """Prompts come in turn, in chunks of at most six tokens, beside sequences that are already decoding."""
    cache = model.cache()
    wanted = {i: 4 + i for i in range(len(PROMPTS))}
    pending, running = dict(enumerate(PROMPTS)), {}
    written: dict[int, list[int]] = {i: [] for i in pending}
    steps = 0
    while pending or running:
        if pending and steps % 2 == 0:
            i = min(pending)
            running[i] = [cache.allocate(), pending.pop(i)]
        feeds = {i: text[:6] for i, (_, text) in running.items()}
        batch = cache.append([running[i][0] for i in feeds], [len(f) for f in feeds.values()])
        found = model.step(np.concatenate([*feeds.values()]), batch)
        for i, end in zip(feeds, batch.cu_seqlens[1:], strict=True):
            rest = running[i][1][6:]
            if rest:
                running[i][1] = rest
                continue
            written[i].append(int(found[end - 1]))
            running[i][1] = [written[i][-1]]
            if len(written[i]) == wanted[i]:
                cache.free(running.pop(i)[0])
        steps += 1
    assert cache.memory().tokens == 0
    assert cache.free_pages == cache.memory().pages
    for i, words in written.items():
        assert words == model.alone(PROMPTS[i], wanted[i])


def test_shared_prefix(model):
    """Forks of one prompt go on differently, and the prompt is held once."""
    cache = model.cache()
    prompt = PROMPTS[1]
    first = cache.allocate()
    model.step(prompt, cache.append([first], len(prompt)))
    forks = [first, cache.fork(first), cache.fork(first)]
    assert cache.memory().shared_pages == -(-len(prompt) // cache.page_size)
    tails = [[3], [4], [5]]
    for _ in range(5):
        found = model.step([tail[-1] for tail in tails], cache.append(forks, 1))
        for tail, word in zip(tails, found, strict=True):
            tail.append(int(word))
    assert cache.memory().shared_pages == len(prompt) // cache.page_size
    for tail in tails:
        assert tail[1:] == model.alone([*prompt, tail[0]], 5)


def test_speculation(model):
    """Drafted words, some of them wrong, are checked in one step; what is refused is taken back."""
    cache = model.cache()
    prompt, count = PROMPTS[3], 12
    right = model.alone(prompt, count)
    sequence = cache.allocate()
    text = [int(model.step(prompt, cache.append([sequence], len(prompt)))[-1])]
    rounds = 0
    while len(text) < count:
        draft = [w if (len(text) + j) % 3 else (w + 1) % WORDS for j, w in enumerate(right[len(text) :][:4])]
        found = model.step([text[-1], *draft], cache.append([sequence], 1 + len(draft)))
        accepted = 0
        while accepted < len(draft) and draft[accepted] == found[accepted]:
            accepted += 1
        text += [*draft[:accepted], int(found[accepted])]
        cache.truncate(sequence, len(prompt) + len(text) - 1)
        rounds += 1
    assert text[:count] == right
    assert rounds < count - 1


def test_tree_of_speculation(model):
    """Each node of a tree gives the word that its own branch gives as plain text."""
    cache = model.cache()
    prompt = PROMPTS[0]
    sequence = cache.allocate()
    model.step(prompt, cache.append([sequence], len(prompt)))
    parents, words = [-1, 0, 0, 1, 1, 2], [4, 5, 6, 7, 8, 9]
    ancestors = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    depth = len(prompt) + ancestors.sum(axis=1) - 1
    batch = cache.append([sequence], len(parents))
    found = model.step(words, batch, causal=False, mask=af.masks.tree(ancestors), rotary_positions=depth)
    for node in range(len(parents)):
        branch = [words[i] for i in np.flatnonzero(ancestors[node])]
        assert found[node] == model.alone([*prompt, *branch], 1)[0]
    accepted = np.flatnonzero(ancestors[4])
    cache.keep(sequence, len(prompt), [len(prompt) + node for node in accepted])
    text = [*prompt, *[words[node] for node in accepted]]
    assert cache.length(sequence) == len(text)
    again = model.step([found[4]], cache.append([sequence], 1))[0]
    assert [found[4], again] == model.alone(text, 2)


def test_window_that_moves_on(model):
    """With a window, keys behind it are forgotten, and their pages given back, without changing a word."""
    prompt, count, window = PROMPTS[1], 20, (7, 0)
    tails = []
    for forgetting in (False, True):
        cache = model.cache(page_size=2)
        sequence = cache.allocate()
        batch = cache.append([sequence], len(prompt))
        text = [int(model.step(prompt, batch, window=window)[-1])]
        for _ in range(count):
            if forgetting:
                cache.forget(sequence, max(0, cache.length(sequence) - window[0]))
            text.append(int(model.step(text[-1:], cache.append([sequence], 1), window=window)[0]))
        tails.append(text)
        used = cache.memory().pages - cache.free_pages
        length = len(prompt) + count
        first = length - 1 - window[0] if forgetting else 0
        assert used == -(-length // 2) - first // 2
    assert tails[0] == tails[1]
