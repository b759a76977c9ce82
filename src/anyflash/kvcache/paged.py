"""The keys and values of many sequences in pages of one memory: what a server keeps between calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyflash.core.dtypes import FLOATS, ITEMSIZE
from anyflash.core.errors import InvalidCall
from anyflash.frontends import registry
from anyflash.kvcache.attention import KVCache

_FORGOTTEN = -1


class Memory(NamedTuple):
    """What a `PagedCache` holds.

    bytes         of all pages of all layers, taken when the cache was made
    bytes_used    of the pages that a sequence holds
    pages         how many there are; `free_pages` are held by none, `shared_pages` by several sequences
    tokens        keys of all sequences; one that is shared counts for each
    free_slots    slots in pages that are held, behind the last key of the sequence
    """

    bytes: int
    bytes_used: int
    pages: int
    free_pages: int
    shared_pages: int
    tokens: int
    free_slots: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Some sequences of a `PagedCache`, for one call a layer.

    seqlens      (B,) int32, slots in use before the new tokens
    cu_seqlens   (B + 1,) int32, cumulative numbers of new tokens: `cu_seqlens_q` of a call whose packed
                 queries are the new tokens
    """

    k: Any
    v: Any
    seqlens: Any
    block_table: Any
    leftpad: Any
    cu_seqlens: Any

    def __getitem__(self, layer: int) -> KVCache:
        """The cache of one layer."""
        return KVCache(self.k[layer], self.v[layer], self.seqlens, self.block_table, self.leftpad)


@dataclass(slots=True)
class _Sequence:
    """`pages` reach exactly to `length`; those whose keys are all forgotten are _FORGOTTEN."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    leftpad: int = 0


class PagedCache:
    """Pages of keys and values for all layers of a model, handed out to sequences.

    A sequence is a number that `allocate` or `fork` gives. `append` makes room for new tokens and gives the
    `Batch` that `anyflash.attention_kvcache` takes, layer by layer. Forks share pages until one of them is
    written to, which copies it first. With `page_size` as long as the longest sequence this is a dense cache:
    one page a sequence.

    Args:
        like: an array of numpy or torch; the cache is of its framework and dtype, and lies where it does.
        layers: how many layers the model has.
        num_pages: pages of each layer, all taken from memory at once.
        page_size: slots of a page, at least 1.
        heads_kv: heads of keys and values.
        head_dim: of keys.
        head_dim_v: of values; None is `head_dim`.

    Example:
        >>> import numpy as np, anyflash as af
        >>> new = np.ones((1, 5, 2, 16), np.float32)
        >>> cache = af.kvcache.PagedCache(new, layers=1, num_pages=8, page_size=4, heads_kv=2, head_dim=16)
        >>> prompt = cache.allocate()
        >>> batch = cache.append([prompt], 5)
        >>> out = af.attention_kvcache(new, batch[0], new, new, causal=True)
        >>> other = cache.fork(prompt)
        >>> step = np.ones((2, 1, 2, 16), np.float32)
        >>> batch = cache.append([prompt, other], 1)
        >>> out = af.attention_kvcache(step, batch[0], step, step, causal=True)
        >>> cache.memory().tokens, cache.memory().shared_pages, cache.memory().free_pages
        (12, 1, 5)
    """

    def __init__(
        self,
        like: Any,
        *,
        layers: int,
        num_pages: int,
        page_size: int,
        heads_kv: int,
        head_dim: int,
        head_dim_v: int | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        extents = {
            "layers": layers,
            "num_pages": num_pages,
            "page_size": page_size,
            "heads_kv": heads_kv,
            "head_dim": head_dim,
            "head_dim_v": head_dim_v,
        }
        for argument, extent in extents.items():
            if not isinstance(extent, int) or isinstance(extent, bool) or extent < 1:
                raise InvalidCall(argument, repr(extent), "a whole number of at least 1")
        self._frontend, self._like = registry.of("like", like), like
        dtype = self._frontend.dtype(like)
        if dtype not in FLOATS:
            raise InvalidCall("like", f"dtype {dtype}", f"one of {', '.join(FLOATS)}")
        places = (layers, num_pages, page_size, heads_kv)
        self.k, _ = self._frontend.empty((*places, head_dim), dtype, like)
        self.v, _ = self._frontend.empty((*places, head_dim_v), dtype, like)
        self.page_size = page_size
        self._page_bytes = layers * page_size * heads_kv * (head_dim + head_dim_v) * ITEMSIZE[dtype]
        self._holders = np.zeros(num_pages, np.int64)
        self._free = list(reversed(range(num_pages)))
        self._sequences: dict[int, _Sequence] = {}
        self._made = 0

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def allocate(self) -> int:
        """A new sequence without tokens."""
        return self._add(_Sequence())

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that begins with the first `length` tokens of another, None for all. Takes no page.

        Raises InvalidCall if there is no such sequence, or it has fewer tokens.
        """
        found = self._get(sequence)
        length = found.length if length is None else length
        self._check_length(found, length)
        pages = found.pages[: -(-length // self.page_size)]
        for page in pages:
            if page != _FORGOTTEN:
                self._holders[page] += 1
        return self._add(_Sequence(pages, length, found.leftpad))

    def free(self, sequence: int) -> None:
        """Give up a sequence; pages that no other holds are free afterwards."""
        self._release(self._get(sequence).pages)
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        """Slots of a sequence, those that are forgotten included: the position of its next token."""
        return self._get(sequence).length

    def pages_needed(self, sequences: Sequence[int], tokens: int | Sequence[int]) -> int:
        """Free pages that `append` would take. Raises InvalidCall as it does, but not for want of pages."""
        return self._needed(sequences, self._counts(sequences, tokens))

    def append(self, sequences: Sequence[int], tokens: int | Sequence[int]) -> Batch:
        """Make room for new tokens, which from now on count as tokens of the sequences.

        Their keys and values are written by one `attention_kvcache` with the returned batch for each layer.
        If a step fails before that, `truncate` takes the tokens back.

        Args:
            sequences: B of them, none twice.
            tokens: how many new ones, for each or for all; 0 is allowed.

        Raises:
            InvalidCall: there is no such sequence, or there are fewer free pages than `pages_needed`; nothing
                has changed then.
        """
        counts = self._counts(sequences, tokens)
        needed = self._needed(sequences, counts)
        if needed > len(self._free):
            raise InvalidCall(
                "tokens",
                f"{sum(counts)} for {len(counts)} sequences, which takes {needed} pages",
                f"at most {len(self._free)}, the free pages",
                "free() gives back those of a sequence, and pages_needed() asks beforehand",
            )
        batch_lengths = [self._get(sequence).length for sequence in sequences]
        for sequence, count in zip(sequences, counts, strict=True):
            self._grow(self._get(sequence), count)
        return self._batch(sequences, batch_lengths, counts)

    def view(self, sequences: Sequence[int]) -> Batch:
        """A batch that only reads, for queries without new tokens."""
        counts = self._counts(sequences, 0)
        return self._batch(sequences, [self._get(sequence).length for sequence in sequences], counts)

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens: for speculated ones that were refused.

        Raises InvalidCall if there is no such sequence, or it has fewer tokens.
        """
        found = self._get(sequence)
        self._check_length(found, length)
        kept = -(-length // self.page_size)
        self._release(found.pages[kept:])
        del found.pages[kept:]
        found.length = length

    def keep(self, sequence: int, length: int, slots: Sequence[int]) -> None:
        """Keep the first `length` tokens and, moved up behind them, those at `slots`: for the branch of a
        speculated tree that was accepted.

        Args:
            slots: ascending, each from `length` to the sequence's length - 1.

        Raises InvalidCall as `truncate`, if the slots are not as above, or if tokens would move in shared
        pages and there are no free ones to copy those to; nothing has changed then.
        """
        found, size = self._get(sequence), self.page_size
        self._check_length(found, length)
        edges = [length - 1, *slots, found.length]
        if any(a >= b for a, b in pairwise(edges)):
            raise InvalidCall("slots", repr(list(slots)), f"ascending, {length} to {found.length - 1}")
        moved = [(source, length + i) for i, source in enumerate(slots) if source != length + i]
        written = {target // size for _, target in moved}
        shared = [column for column in sorted(written) if self._holders[found.pages[column]] > 1]
        if len(shared) > len(self._free):
            raise InvalidCall(
                "slots",
                f"{len(shared)} shared pages to be copied",
                f"at most {len(self._free)}, the free pages",
            )
        for column in shared:
            self._copy(found, column)
        if moved:
            (from_pages, from_rows), (to_pages, to_rows) = (
                ([found.pages[slot // size] for slot in side], [slot % size for slot in side])
                for side in zip(*moved, strict=True)
            )
            for array in (self.k, self.v):
                array[:, to_pages, to_rows] = array[:, from_pages, from_rows]
        self.truncate(sequence, length + len(slots))

    def forget(self, sequence: int, tokens: int) -> None:
        """Drop the first `tokens` tokens, those forgotten before included, as a window that moved on allows.

        The others keep their slots, and so their rotary positions. Raises InvalidCall as `truncate`.
        """
        found = self._get(sequence)
        if not found.leftpad <= tokens <= found.length:
            raise InvalidCall("tokens", repr(tokens), f"{found.leftpad} to {found.length}")
        found.leftpad = tokens
        whole = tokens // self.page_size
        self._release(found.pages[:whole])
        found.pages[:whole] = [_FORGOTTEN] * whole

    def memory(self) -> Memory:
        """What is held, at this moment."""
        pages, free = len(self._holders), len(self._free)
        held = self._sequences.values()
        return Memory(
            pages * self._page_bytes,
            (pages - free) * self._page_bytes,
            pages,
            free,
            int((self._holders > 1).sum()),
            sum(s.length - s.leftpad for s in held),
            sum(len(s.pages) * self.page_size - s.length for s in held),
        )

    def _add(self, sequence: _Sequence) -> int:
        self._made += 1
        self._sequences[self._made] = sequence
        return self._made

    def _get(self, sequence: int) -> _Sequence:
        found = self._sequences.get(sequence)
        if found is None:
            raise InvalidCall(
                "sequence", repr(sequence), "a number from allocate() or fork() that was not freed"
            )
        return found

    def _check_length(self, sequence: _Sequence, length: int) -> None:
        if not sequence.leftpad <= length <= sequence.length:
            raise InvalidCall("length", repr(length), f"{sequence.leftpad} to {sequence.length}")

    def _counts(self, sequences: Sequence[int], tokens: int | Sequence[int]) -> list[int]:
        if len(set(sequences)) != len(sequences):
            raise InvalidCall("sequences", repr(list(sequences)), "each of them once")
        for sequence in sequences:
            self._get(sequence)
        counts = [tokens] * len(sequences) if isinstance(tokens, int) else [int(n) for n in tokens]
        if len(counts) != len(sequences) or min(counts, default=0) < 0:
            raise InvalidCall(
                "tokens", repr(tokens), f"a number of at least 0, or {len(sequences)}, one a sequence"
            )
        return counts

    def _needed(self, sequences: Sequence[int], counts: Sequence[int]) -> int:
        needed, copied = 0, Counter[int]()
        for sequence, count in zip(sequences, counts, strict=True):
            found = self._get(sequence)
            needed += -(-(found.length + count) // self.page_size) - len(found.pages)
            page = self._written_page(found, count)
            if page is not None and self._holders[page] - copied[page] > 1:
                copied[page] += 1
                needed += 1
        return needed

    def _written_page(self, sequence: _Sequence, count: int) -> int | None:
        """The page, already held, into which the first of `count` new tokens goes."""
        inside = count > 0 and sequence.length % self.page_size > 0
        return sequence.pages[-1] if inside else None

    def _grow(self, sequence: _Sequence, count: int) -> None:
        shared = self._written_page(sequence, count)
        if shared is not None and self._holders[shared] > 1:
            self._copy(sequence, -1)
        sequence.length += count
        while len(sequence.pages) * self.page_size < sequence.length:
            sequence.pages.append(self._take())

    def _copy(self, sequence: _Sequence, column: int) -> None:
        """A page of its own for a sequence that shares one."""
        own, shared = self._take(), sequence.pages[column]
        self.k[:, own] = self.k[:, shared]
        self.v[:, own] = self.v[:, shared]
        self._release([shared])
        sequence.pages[column] = own

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            if page != _FORGOTTEN:
                self._holders[page] -= 1
                if not self._holders[page]:
                    self._free.append(page)

    def _batch(self, sequences: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> Batch:
        held = [self._get(sequence) for sequence in sequences]
        table = np.zeros((len(held), max([1, *[len(s.pages) for s in held]])), np.int32)
        for row, sequence in zip(table, held, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        leftpad = np.array([s.leftpad for s in held], np.int32)
        return Batch(
            self.k,
            self.v,
            self._array(np.array(lengths, np.int32)),
            self._array(table),
            self._array(leftpad) if leftpad.any() else None,
            self._array(np.cumsum([0, *counts]).astype(np.int32)),
        )

    def _array(self, values: NDArray[np.int32]) -> Any:
        return self._frontend.integers(values, self._like)
