"""Keys and values that do not lie one behind the other: in pages, behind padding, used in part."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import anyflash
from anyflash.compat import calls
from anyflash.compat.calls import Lengths, Terms
from anyflash.compat.errors import expect


def attend(
    q: Tensor, k: Tensor, v: Tensor, what: Terms, lengths: Lengths, block_table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed q. With a block table k and v are pages, read where they are; copied from there
    only for what a cache has not, which is gradients and dropout."""
    if block_table is None:
        return calls.attend(q, k, v, what, lengths)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if wanted or what.dropout_p:
        k, v, lengths = gathered(k, v, block_table, lengths)
        return calls.attend(q, k, v, what, lengths)
    check_table(k, block_table, lengths)
    cache = anyflash.KVCache(k, v, lengths.k_lens, block_table)
    keywords = calls.cache_keywords(what)
    return anyflash.attention_kvcache(q, cache, cu_seqlens_q=lengths.cu_q, return_lse=True, **keywords)


def gathered(k: Tensor, v: Tensor, block_table: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor, Lengths]:
    """Pages (blocks, page, heads, D) as packed rows. Sequence b has `lengths.k_lens[b]` keys, in the pages
    that row b of `block_table` names."""
    check_table(k, block_table, lengths)
    page = k.shape[1]
    lens = lengths.k_lens.long()
    sequence = torch.repeat_interleave(torch.arange(len(lens), device=k.device), lens)
    starts = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    key = torch.arange(int(starts[-1]), device=k.device) - starts[sequence]
    block = block_table.long()[sequence, key // page]
    inside = (block >= 0) & (block < k.shape[0])
    expect(
        bool(inside.all()),
        "block_table must name blocks of the cache",
        f"an entry in use is outside 0 .. {k.shape[0] - 1}",
    )
    row = block * page + key % page
    return _picked(k.flatten(0, 1), row), _picked(v.flatten(0, 1), row), _contiguous(lengths, starts)


def check_table(k: Tensor, block_table: Tensor, lengths: Lengths) -> None:
    """Raises Refused unless each sequence's keys fit into the pages of its row. Lengths on a device are not
    looked at: that would wait for it."""
    shape = "block_table must have shape (batch_size, max_num_blocks_per_seq)"
    found = f"block_table {tuple(block_table.shape)} pages of {k.shape[1]}"
    expect(block_table.ndim == 2 and block_table.shape[0] == lengths.sequences, shape, found)
    k_lens = lengths.k_lens
    if k_lens.device.type == "cpu":
        room = block_table.shape[-1] * k.shape[1]
        expect(bool((k_lens <= room).all()), shape, f"{found}, lengths {k_lens.tolist()}")


def without_left_padding(
    k: Tensor, v: Tensor, leftpad_k: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Lengths]:
    """The packed rows of each sequence from `leftpad_k` on."""
    pad = leftpad_k.long()
    lens = (lengths.k_lens.long() - pad).clamp_min(0)
    sequence = torch.repeat_interleave(torch.arange(len(lens), device=k.device), lens)
    starts = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    row = torch.arange(int(starts[-1]), device=k.device) - starts[sequence]
    row = row + (lengths.cu_k[:-1].long() + pad)[sequence]
    return _picked(k, row), _picked(v, row), _contiguous(lengths, starts)


def used_rows(q: Tensor, seqused_q: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor, Lengths]:
    """(the first `seqused_q` rows of each sequence, where they were, lengths of the packed rest)."""
    used = torch.minimum(seqused_q.long(), lengths.cu_q.long().diff())
    sequence = torch.repeat_interleave(torch.arange(len(used), device=q.device), used)
    starts = torch.nn.functional.pad(used.cumsum(0), (1, 0))
    row = torch.arange(int(starts[-1]), device=q.device) - starts[sequence]
    row = row + lengths.cu_q[:-1].long()[sequence]
    return _picked(q, row), row, replace(lengths, cu_q=starts.to(torch.int32))


def _picked(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index)


def _contiguous(lengths: Lengths, starts: Tensor) -> Lengths:
    return replace(lengths, cu_k=starts.to(torch.int32), used_k=None)
