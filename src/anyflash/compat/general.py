"""Attention of the later generations, whose q and k may each be dense, packed, partly used, or in pages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import anyflash
from anyflash.compat import calls, pages
from anyflash.compat.calls import Lengths, Terms
from anyflash.compat.errors import expect, unsupported
from anyflash.core.errors import AnyflashError


@dataclass(frozen=True, slots=True)
class Places:
    """Where the sequences lie. A side without cumulative lengths is dense: (batch, rows, heads, D)."""

    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    used_q: Tensor | None = None
    used_k: Tensor | None = None
    block_table: Tensor | None = None


def attend(
    q: Tensor, k: Tensor, v: Tensor, what: Terms, places: Places, qv: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in our conventions; lse (B, H, Sq), or (H, total q) where q is packed."""
    if qv is not None:
        q, k, what = _with_values(q, k, v, what, qv)
    if all(getattr(places, name) is None for name in Places.__slots__):
        return calls.attend(q, k, v, what)
    rows, cu_q = packed(q, places.cu_q)
    if places.block_table is None:
        (k, cu_k), (v, _) = packed(k, places.cu_k), packed(v, places.cu_k)
        lengths = Lengths(cu_q, cu_k, used_k=places.used_k)
    else:
        used = places.used_k if places.cu_k is None else places.cu_k.diff()
        expect(used is not None, "seqused_k must be provided if page_table is provided", "neither length")
        assert used is not None
        lengths = Lengths(cu_q, torch.nn.functional.pad(used.cumsum(0), (1, 0)).to(torch.int32))
    if places.used_q is None:
        out, lse = pages.attend(rows, k, v, what, lengths, places.block_table)
    else:
        picked, where, lengths = pages.used_rows(rows, places.used_q, lengths)
        some_out, some_lse = pages.attend(picked, k, v, what, lengths, places.block_table)
        total = rows.shape[0]
        out = some_out.new_zeros((total, *some_out.shape[1:])).index_copy(0, where, some_out)
        empty = some_lse.new_full((some_lse.shape[0], total), -torch.inf)
        lse = empty.index_copy(1, where, some_lse)
    if places.cu_q is not None:
        return out, lse
    batch = q.shape[0]
    return out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1)


def packed(x: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows, cumulative lengths) of one side, (batch, rows, heads, D) where it has no lengths."""
    if starts is not None:
        return x, starts
    batch, rows = x.shape[:2]
    return x.flatten(0, 1), torch.arange(batch + 1, dtype=torch.int32, device=x.device) * rows


def _with_values(q: Tensor, k: Tensor, v: Tensor, what: Terms, qv: Tensor) -> tuple[Tensor, Tensor, Terms]:
    """q . k + qv . v is one product: of (q, qv) and (k, v)."""
    scale = (q.shape[-1] + qv.shape[-1]) ** -0.5 if what.scale is None else what.scale
    return torch.cat((q, qv), dim=-1), torch.cat((k, v), dim=-1), replace(what, scale=scale)


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """Partial results over disjoint keys, (splits, ..., H, D) and (splits, ..., H), as one, in float32."""
    greatest = lse_partial.amax(0)
    base = greatest.masked_fill(greatest == -torch.inf, 0)
    shares = (lse_partial - base).exp()
    total = shares.sum(0)
    kept = out_partial.masked_fill((shares == 0).unsqueeze(-1), 0)
    out = (shares.unsqueeze(-1) * kept).sum(0) / total.masked_fill(total == 0, 1).unsqueeze(-1)
    return out, base + total.log()


@dataclass(frozen=True, slots=True)
class SeqlenInfo:
    """What functions of flash_attn.cute are told about lengths, in symbols."""

    seqlen_q: Any
    seqlen_k: Any


def score_function(score_mod: Any, aux_tensors: Any) -> Callable[[Any, Any], Any] | None:
    """A score function of ours from flash_attn.cute's (score, batch, head, row, key, lengths, tables)."""
    if score_mod is None:
        return None
    function, tables = _plain_function(score_mod), _tables(aux_tensors)

    def score(s: Any, at: Any) -> Any:
        where = (at.batch, at.head, at.row, at.k, SeqlenInfo(at.q_len, at.k_len), tables)
        return _symbolic("score_mod", function, s, *where)

    return score


def mask_function(mask_mod: Any, aux_tensors: Any) -> Callable[[Any], Any] | None:
    """A mask of ours from flash_attn.cute's (batch, head, row, key, lengths, tables)."""
    if mask_mod is None:
        return None
    function, tables = _plain_function(mask_mod), _tables(aux_tensors)

    def mask(at: Any) -> Any:
        where = (at.batch, at.head, at.row, at.k, SeqlenInfo(at.q_len, at.k_len), tables)
        return _symbolic("mask_mod", function, *where)

    return mask


def _plain_function(function: Any) -> Any:
    """The Python function inside what a compiler's decorator made of it."""
    return inspect.unwrap(function)


def _tables(aux_tensors: Any) -> list[Any] | None:
    return None if aux_tensors is None else [anyflash.table(tensor) for tensor in aux_tensors]


def _symbolic(name: str, function: Any, *symbols: Any) -> Any:
    try:
        return function(*symbols)
    except AnyflashError:
        raise
    except Exception as cause:
        raise unsupported(
            name,
            getattr(function, "__name__", "function"),
            f"it does not run on symbols: {type(cause).__name__}: {cause}",
            "Operators and anyflash.where, tanh, exp, log, minimum, maximum work; those of cutlass do not",
        ) from cause
