"""A packed case of the contract laid out as a call over a KV cache: its keys are cached, or come as new ones.

Whatever holds no key is NaN or nonsense: slots, pages, and entries of the page table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import anyflash as af
from anyflash.contract.cases import Case
from anyflash.contract.truth import formula
from anyflash.contract.values import Values, cumulative

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Form:
    """How a cache lies.

    page_size   slots of a page; None is a dense cache
    leftpad     slots without a key in front of every sequence, reused in turn
    chosen      a dense cache is larger than the batch, and batch_idx picks
    heads_first layout "bhsd"
    """

    id: str
    page_size: int | None = None
    leftpad: tuple[int, ...] = ()
    chosen: bool = False
    heads_first: bool = False
    index: str = "int32"


FORMS = (
    Form("dense"),
    Form("dense_padded", leftpad=(3, 0, 17)),
    Form("dense_chosen", chosen=True, leftpad=(0, 2)),
    Form("dense_heads_first", heads_first=True, index="int64"),
    Form("pages_of_1", page_size=1),
    Form("pages_of_3", page_size=3, leftpad=(4, 1, 0, 2)),
    Form("pages_of_16", page_size=16, index="int64"),
    Form("pages_heads_first", page_size=16, heads_first=True),
    Form("pages_of_256", page_size=256, leftpad=(40, 0)),
)


@dataclass
class Laid:
    """Arguments of a call, and what the cache must hold after it."""

    q: Array
    cache: dict[str, Array | None]
    new: tuple[Array, Array] | None
    keywords: dict[str, Any]
    after_k: Array
    after_v: Array
    packed: bool
    heads_first: bool
    tables: dict[str, Array] = field(default_factory=dict)

    def run(self, backend: str, wrap: Callable[[Array], Any] = lambda array: array) -> tuple[Any, Any]:
        """(out, lse) as the framework gives them; the cache is changed."""
        wrapped = {name: None if a is None else wrap(a) for name, a in self.cache.items()}
        cache = af.KVCache(**wrapped)
        new = () if self.new is None else (wrap(self.new[0]), wrap(self.new[1]))
        keywords = {name: wrap(v) if isinstance(v, np.ndarray) else v for name, v in self.keywords.items()}
        return af.attention_kvcache(wrap(self.q), cache, *new, **keywords, return_lse=True, backend=backend)

    def canonical(self, out: Array, lse: Array) -> dict[str, Array]:
        """Results as those of the packed case: (total, heads, dim) and (heads, total)."""
        if self.heads_first:
            out = out.swapaxes(1, 2)
        if not self.packed:
            out, lse = out.reshape(-1, *out.shape[2:]), lse.swapaxes(0, 1).reshape(lse.shape[1], -1)
        return {"out": np.ascontiguousarray(out), "lse": np.ascontiguousarray(lse)}


def lay_out(
    case: Case,
    values: Values,
    form: Form,
    new_lens: tuple[int, ...] | None = None,
    pick: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Laid:
    """`new_lens` says how many of each sequence's keys, the last ones, come with the call; None for no new
    keys. `pick` lists the sequences of the call; None for all. Queries are packed if their numbers differ."""
    assert case.packed is not None
    rng = np.random.default_rng(seed)
    starts_q, starts_k = cumulative(case.packed)
    pick = tuple(range(len(case.packed.lens_q))) if pick is None else pick
    q_lens = [case.packed.lens_q[i] for i in pick]
    k_lens = np.array([case.packed.lens_k[i] for i in pick])
    count = len(pick)
    new = np.zeros(count, int) if new_lens is None else np.array([new_lens[i] for i in pick])
    pad = np.resize(np.array(form.leftpad or (0,)), len(case.packed.lens_q))[list(pick)]
    total = k_lens + pad
    page_size = form.page_size or int(total.max(initial=1)) + 5
    owned = -(-total // page_size) if form.page_size else np.ones(count, int)
    num_pages = int(owned.sum()) + (3 if form.page_size or form.chosen else 0)
    order = rng.permutation(num_pages) if form.page_size or form.chosen else np.arange(num_pages)
    table = rng.choice([-1, -7, 10**6], (count, int(owned.max(initial=1)) + 2)).astype(form.index)
    (dim, dim_v), kind = case.dims, values.k.dtype
    before = [np.full((num_pages, page_size, case.heads[1], d), np.nan, kind) for d in (dim, dim_v)]
    after = [array.copy() for array in before]
    taken = 0
    for b, sequence in enumerate(pick):
        pages = order[taken : taken + owned[b]]
        taken += owned[b]
        table[b, : len(pages)] = pages
        for j in range(k_lens[b]):
            page, row = divmod(int(pad[b]) + j, page_size)
            for source, early, late in zip((values.k, values.v), before, after, strict=True):
                late[pages[page], row] = source[starts_k[sequence] + j]
                if j < k_lens[b] - new[b]:
                    early[pages[page], row] = source[starts_k[sequence] + j]
    rows_q = np.concatenate([np.arange(starts_q[i], starts_q[i + 1]) for i in pick] or [[]]).astype(int)
    rows_new = np.concatenate(
        [np.arange(starts_k[i + 1] - n, starts_k[i + 1]) for i, n in zip(pick, new, strict=True)] or [[]]
    ).astype(int)
    packed = len(set(q_lens)) != 1 or len(set(new.tolist())) != 1
    keywords: dict[str, Any] = {"scale": case.scale, "sinks": values.sinks}
    for name, factor in values.descale.items():
        by_batch = isinstance(factor, np.ndarray) and factor.ndim == 2 and factor.shape[0] > 1
        keywords[name] = factor[list(pick)] if by_batch else factor
    for piece in (*case.terms, *case.rules):
        keywords.update(piece.arguments(lambda name: values.tables[name]))
    q, fresh = values.q[rows_q], (values.k[rows_new], values.v[rows_new])
    swap = lambda array: array.swapaxes(1, 2) if form.heads_first and not packed else array
    if packed:
        keywords["cu_seqlens_q"] = np.cumsum([0, *q_lens]).astype(form.index)
        keywords["cu_seqlens_k"] = None if new_lens is None else np.cumsum([0, *new]).astype(form.index)
        store = lambda array: array
    else:
        q = q.reshape(count, -1, *q.shape[1:])
        fresh = tuple(array.reshape(count, -1, *array.shape[1:]) for array in fresh)
        keywords["layout"] = "bhsd" if form.heads_first else "bshd"
        store = lambda array: np.ascontiguousarray(swap(array))
    cache: dict[str, Array | None] = {
        "k": store(before[0]),
        "v": store(before[1]),
        "seqlens": (total - new).astype(form.index),
        "block_table": table if form.page_size else None,
        "leftpad": pad.astype(form.index) if form.leftpad else None,
        "batch_idx": table[:, 0].copy() if form.chosen else None,
    }
    return Laid(
        store(q) if not packed else q,
        cache,
        None if new_lens is None else tuple(map(store, fresh)),  # type: ignore[arg-type]
        keywords,
        store(after[0]),
        store(after[1]),
        packed,
        form.heads_first and not packed,
    )


__all__ = ["FORMS", "Form", "Laid", "formula", "lay_out"]
