"""flash_attn's calls in our terms: the forward, the backward from (out, lse), and the probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import anyflash
from anyflash.compat import mapping
from anyflash.compat.errors import Refused
from anyflash.frontends import torch_explicit
from anyflash.semantics import rng

# Columns of the probabilities that one pass computes; head_dim of v may be 1 to 576.
_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class Lengths:
    """Where packed sequences lie, as flash_attn tells it; `longest_*` are its max_seqlen, which decide the
    shape of probabilities and nothing else."""

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int = 0
    longest_k: int = 0
    used_k: Tensor | None = None

    @property
    def sequences(self) -> int:
        return self.cu_q.shape[0] - 1

    @property
    def k_lens(self) -> Tensor:
        return self.cu_k.diff() if self.used_k is None else self.used_k


@dataclass(frozen=True, slots=True)
class Terms:
    """What is computed, in our terms. `seed` None draws one from torch's generator."""

    scale: float | None = None
    causal: bool = False
    window: mapping.Window = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    score: Any = None
    mask: mapping.Mask = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    shifted: bool = False
    """ALiBi is reported in lse as flash_attn's causal kernel does."""
    factors: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    """Of 8-bit q, k and v: (B, Hk)."""
    deterministic: bool = True
    """False leaves gradients to be summed in any order where that is faster."""

    def keywords(self) -> dict[str, Any]:
        names = (
            "scale", "causal", "window", "softcap", "score", "mask", "bias", "alibi_slopes", "sinks",
            "dropout_p",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def descale(self) -> dict[str, Any]:
        return dict(zip(("descale_q", "descale_k", "descale_v"), self.factors, strict=True))


def terms(
    longest_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
    seed: int | None = None,
    deterministic: bool = True,
) -> Terms:
    """Those of generation 2."""
    sides = mapping.window(window_size)
    return Terms(
        softmax_scale,
        bool(causal),
        sides,
        mapping.softcap(softcap),
        alibi_slopes,
        float(dropout_p),
        seed,
        shifted=alibi_slopes is not None and mapping.alibi_is_shifted(causal, sides, longest_k),
        deterministic=mapping.in_order(deterministic),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, what: Terms, lengths: Lengths | None = None) -> Any:
    """(out, lse) in our conventions, differentiable."""
    arguments = {**what.keywords(), **what.descale(), "seed": what.seed, "return_lse": True}
    arguments["deterministic"] = what.deterministic
    if lengths is None:
        return anyflash.attention(q, k, v, **arguments)
    return anyflash.attention_varlen(
        q, k, v, cu_seqlens_q=lengths.cu_q, cu_seqlens_k=lengths.cu_k, seqused_k=lengths.used_k, **arguments
    )


def cache_keywords(what: Terms) -> dict[str, Any]:
    """Those of `anyflash.attention_kvcache`, which knows no dropout."""
    kept = {name: value for name, value in what.keywords().items() if name != "dropout_p"}
    return kept | what.descale()


def drawn(what: Terms) -> Terms:
    """The same with its seed fixed, for a caller that must repeat the dropout."""
    if what.dropout_p == 0.0 or what.seed is not None:
        return what
    return replace(what, seed=torch_explicit.draw_seed())


def their_lse(q: Tensor, k: Tensor, lse: Tensor, what: Terms, lengths: Lengths | None) -> Tensor:
    """lse as generation 2 reports it."""
    return mapping.lse_of_empty_rows(lse + _shift(q, k, lse, what, lengths) if what.shifted else lse)


def _our_lse(q: Tensor, k: Tensor, lse: Tensor, what: Terms, lengths: Lengths | None) -> Tensor:
    lse = torch.where(lse == torch.inf, -torch.inf, lse)
    return lse - _shift(q, k, lse, what, lengths) if what.shifted else lse


def _shift(q: Tensor, k: Tensor, lse: Tensor, what: Terms, lengths: Lengths | None) -> Tensor:
    assert what.alibi_slopes is not None
    slopes = what.alibi_slopes.to(lse.dtype)
    if lengths is None:
        rows = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
        return mapping.alibi_shift(slopes, rows)
    return mapping.alibi_shift(slopes, *mapping.positions(lengths.cu_q, lengths.k_lens, q.shape[0]))


def rng_state(what: Terms, like: Tensor) -> Tensor:
    return torch.tensor([what.seed or 0, 0], dtype=torch.int64, device=like.device)


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    what: Terms,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of attention whose out and lse over all keys are given.

    Those may be of more keys than k has, merged from several calls, as ring attention needs it: probabilities
    are exp(score - lse).
    """
    lse = _our_lse(q, k, softmax_lse, what, lengths)
    packed = None if lengths is None else torch_explicit.Lengths(lengths.cu_q, lengths.cu_k, lengths.used_k)
    keywords = what.keywords()
    bias = keywords.pop("bias")
    found = torch_explicit.backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        lengths=packed,
        seed=what.seed,
        bias=() if bias is None else (bias,),
        deterministic=what.deterministic,
        **keywords,
    )
    return found.dq, found.dk, found.dv


def softmax_d(dout: Tensor, out: Tensor, lengths: Lengths | None = None) -> Tensor:
    """rowsum(dout * out): (B, H, rows rounded up to 128), or (H, total q + 128 B) packed."""
    kind = torch.float64 if out.dtype is torch.float64 else torch.float32
    delta = (dout.to(kind) * out.to(kind)).sum(-1).transpose(-1, -2)
    rows = delta.shape[-1]
    wanted = mapping.round_up(rows) if lengths is None else rows + 128 * lengths.sequences
    return torch.nn.functional.pad(delta, (0, wanted - rows))


def probabilities(q: Tensor, k: Tensor, what: Terms, lengths: Lengths | None = None) -> Tensor:
    """S_dmask: (B, H, Tq, Tk), both rounded up to 128, in q's dtype; below 0 (or -0) where dropped.

    Computed by attention itself, with columns of the unit matrix for v, so it shows what the kernel does.
    """
    if what.seed is None:
        raise Refused("return_softmax is only supported when p_dropout > 0.0", f"p_dropout={what.dropout_p}")
    batch = q.shape[0] if lengths is None else lengths.sequences
    rows = q.shape[1] if lengths is None else lengths.longest_q
    keys = k.shape[1] if lengths is None else lengths.longest_k
    heads = q.shape[-2]
    result = q.new_zeros((batch, heads, mapping.round_up(rows), mapping.round_up(keys)))
    plain = replace(what, dropout_p=0.0, seed=None)
    for first in range(0, keys, _COLUMNS):
        count = min(_COLUMNS, keys - first)
        part, _ = attend(q, k, _unit_columns(k, lengths, first, count), plain, lengths)
        result[:, :, :rows, first : first + count] = _by_sequence(part, lengths).transpose(1, 2)
    for b in range(batch):
        for h in range(heads):
            factors = rng.dropout_factors(what.dropout_p, what.seed, b, h, rows, keys)
            dropped = torch.from_numpy(factors == 0).to(q.device)
            window = result[b, h, :rows, :keys]
            window[dropped] = -window[dropped]
    return result


def _unit_columns(k: Tensor, lengths: Lengths | None, first: int, count: int) -> Tensor:
    """v whose row for key j of a sequence is the unit vector of j - first, or 0 where that is no column."""
    if lengths is None:
        key = torch.arange(k.shape[1], device=k.device)
    else:
        token = torch.arange(k.shape[0], device=k.device)
        starts = lengths.cu_k.long()
        key = token - starts[torch.searchsorted(starts[1:], token, right=True).clamp_max(len(starts) - 2)]
    unit = (key[:, None] - first == torch.arange(count, device=k.device)).to(k.dtype)
    if lengths is None:
        return unit[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    return unit[:, None].expand(-1, k.shape[1], -1)


def _by_sequence(packed: Tensor, lengths: Lengths | None) -> Tensor:
    """(total, H, D) as (batch, longest, H, D), 0 where there is no row."""
    if lengths is None:
        return packed
    starts, lens = lengths.cu_q.long(), lengths.cu_q.long().diff()
    row = torch.arange(lengths.longest_q, device=packed.device)
    token = (starts[:-1, None] + row).clamp_max(max(packed.shape[0] - 1, 0))
    return packed[token].masked_fill((row >= lens[:, None])[:, :, None, None], 0)
