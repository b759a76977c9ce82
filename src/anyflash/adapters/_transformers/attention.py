"""The attention function registered with transformers.

What transformers hands over, and where its conventions differ from ours:

    query           (batch, heads, q, head_dim); key, value with their own, fewer heads; never repeated
    attention_mask  None | FormulaMask | bool (batch, 1, q, k), True = attend | additive float
    is_causal       used only without a mask and with q > 1. Then more keys than queries means a static cache
                    filled from its start: the keys past the queries do not exist yet and are dropped
    cu_seq_lens_*   bounds of packed sequences in one batch entry, used unless a mask says more than they do
    sliding_window  W keys, the query's own included; a mask holds it already
    s_aux           (heads,) logits that join the denominator
    position_bias   (1 or batch, heads, q, k), added to the scores, with gradient
    indices         (batch, q, chosen) keys of sparse attention: all others are masked
    position_ids    (batch, q), looked at without a mask only, as DeepSpeed's Ulysses calls: positions that
                    restart mark packed sequences
    result          (batch, q, heads, head_dim), and None for the weights, which are never formed
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from anyflash import api
from anyflash.adapters._transformers.mask import FormulaMask, only_packs
from anyflash.core.errors import Unsupported
from anyflash.semantics.mask import Mask


def attention_for_transformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: object = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one transformers layer; the signature is that of its `AttentionInterface`."""
    if cache is not None:
        raise Unsupported(
            "transformers' continuous batching",
            {"anyflash": ["its paged cache is not read in place"]},
            'use attn_implementation="sdpa" with generate_batch',
        )
    if kwargs.get("output_attentions"):
        warnings.warn(
            'anyflash never forms attention weights; use attn_implementation="eager" for output_attentions',
            stacklevel=2,
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    score: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    bounds = cu_seq_lens_q is not None and cu_seq_lens_k is not None and q.shape[0] == 1
    if isinstance(attention_mask, FormulaMask):
        bounds = bounds and only_packs(attention_mask, is_causal, sliding_window)
    elif attention_mask is not None:
        bounds = False
    if bounds and indices is None and position_bias is None:
        out = api.attention_varlen(
            q[0],
            k[0],
            v[0],
            cu_seqlens_q=cu_seq_lens_q,
            cu_seqlens_k=cu_seq_lens_k,
            causal=is_causal,
            window=_window(sliding_window, is_causal),
            **score,
        )
        return out[None], None

    is_causal = is_causal and attention_mask is None and q.shape[1] > 1
    if is_causal and k.shape[1] > q.shape[1]:
        written = q.shape[1]
        k, v = k[:, :written], v[:, :written]
        position_bias = None if position_bias is None else position_bias[..., :written]
    packing = _packing(position_ids, q.shape[1], k.shape[1]) if attention_mask is None else None
    if indices is not None:
        attention_mask = _only(indices, attention_mask, k.shape[1])
    mask, biases = _mask(attention_mask, q, k)
    if packing is not None:
        mask = packing if mask is None else packing & mask
    biases = biases if position_bias is None else [position_bias, *biases]
    out = api.attention(q, k, v, causal=is_causal, mask=mask, bias=biases or None, **score)
    return out.contiguous(), None


def _window(sliding_window: int | None, causal: bool) -> tuple[int, int | None] | None:
    """transformers' W keys, own one included, as our inclusive distances."""
    if sliding_window is None:
        return None
    return (sliding_window - 1, None if causal else sliding_window - 1)


def _mask(
    attention_mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
) -> tuple[Any, list[torch.Tensor]]:
    """A mask for `anyflash.attention`, and additive masks. A matrix longer than the keys is cut; a formula
    counts positions in the shape it was made for, so for any other it is taken as a matrix too."""
    if attention_mask is None:
        return None, []
    if isinstance(attention_mask, FormulaMask):
        if attention_mask.shape == (q.shape[0], 1, q.shape[1], k.shape[1]):
            formula = attention_mask.formula
            return (lambda at: formula), []
        attention_mask = attention_mask.build()
    matrix = attention_mask[..., : k.shape[1]]
    return (matrix, []) if matrix.dtype == torch.bool else (None, [matrix])


def _packing(position_ids: torch.Tensor | None, rows: int, keys: int) -> Mask | None:
    """Tokens see those of their own sequence, where positions restart."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != rows or rows != keys:
        return None
    # While torch traces, values must not decide anything; a mask is there then.
    if torch.compiler.is_compiling():
        return None
    starts = position_ids.diff(dim=1) != 1
    if not bool(starts.any()):
        return None
    sequence = api.table(torch.nn.functional.pad(starts.cumsum(1), (1, 0)).to(torch.int32).contiguous())
    if sequence.array.shape[0] == 1:
        return Mask(lambda at: sequence[0, at.row] == sequence[0, at.k])
    return Mask(lambda at: sequence[at.batch, at.row] == sequence[at.batch, at.k])


def _only(indices: torch.Tensor, attention_mask: torch.Tensor | None, keys: int) -> torch.Tensor:
    """The mask (batch, 1, q, k) that leaves of `attention_mask` the chosen keys. A negative index chooses
    none."""
    chosen = torch.zeros(*indices.shape[:2], keys + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(-1, torch.where(indices < 0, keys, indices).long(), True)
    chosen = chosen[:, None, :, :keys]
    if attention_mask is None:
        return chosen
    matrix = attention_mask[..., :keys]
    return matrix & chosen if matrix.dtype == torch.bool else matrix.masked_fill(~chosen, float("-inf"))
