"""The kernel that Colossal-AI's loaders hand out.

q, k, v         (batch, heads, rows, head_dim); k and v may have fewer heads, which are never repeated
attention_mask  additive, (batch, 1, rows, keys), or empty where Colossal-AI found it too large. With
                `is_causal` or bounds it says again what those say, and is not read
is_causal       upper-left, as the mask is that comes with it; a single row sees every key
bounds          of what is not padding: `q_indices` and `kv_indices` number it in (batch x rows) order, and
                `cu_seqlens_*` say where each batch entry's begins. Padding rows of the result are 0
result          (batch, heads, rows, head_dim)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflash import api
from anyflash.semantics.mask import Mask, upper_left


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    q_indices: Tensor | None = None,
    kv_indices: Tensor | None = None,
) -> Tensor:
    """What `load()` of Colossal-AI's flash attention extensions gives; the signature is theirs."""
    call: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
    causal = is_causal and q.shape[2] > 1
    if q_indices is None or kv_indices is None:
        if causal:
            call["mask"] = upper_left()
        elif attention_mask is not None and not is_causal:
            call["bias"] = attention_mask
        return api.attention(q, k, v, layout="bhsd", **call)
    if causal and q_indices is not kv_indices:
        # Padded apart from each other: rows and keys then count in the batch, as its mask does.
        call["mask"] = upper_left() & _present(kv_indices, k)
        return api.attention(q, k, v, layout="bhsd", **call)
    rows = _places(q_indices, q.shape[2])
    keys = rows if kv_indices is q_indices and k.shape[2] == q.shape[2] else _places(kv_indices, k.shape[2])
    packed = api.attention_varlen(
        _at(q, rows),
        _at(k, keys),
        _at(v, keys),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_kv,
        causal=causal,
        **call,
    )
    out = packed.new_zeros(q.shape[0], q.shape[2], *packed.shape[1:])
    return out.index_put(rows, packed).transpose(1, 2)


def _places(indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Batch entry and row of every index."""
    return indices // length, indices % length


def _at(t: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """(tokens, heads, head_dim) out of (batch, heads, rows, head_dim)."""
    return t.transpose(1, 2)[places]


def _present(indices: Tensor, k: Tensor) -> Mask:
    keys = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    keys.view(-1)[indices] = True
    table = api.table(keys)
    return Mask(lambda at: table[at.batch, at.k])
