"""`flash_attn.bert_padding`: from padded batches to packed rows and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Unpadded = tuple[Tensor, Tensor, Tensor, int, Tensor]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """`input[indices]` along the first axis: (rows, ...) and (n,) give (n, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(n, ...) placed at `indices` of (first_axis_dim, ...); the other rows are 0."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices.long(), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(`index_first_axis`, the input), for a layer that adds the input again later."""
    return index_first_axis(input, indices), input


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None) -> Unpadded:
    """Pack the rows of a padded batch.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), true or 1 where a token is valid.
        unused_mask: (batch, seqlen), true or 1 where a token has its place among the packed rows but is not
            in use.

    Returns:
        (hidden_states (nnz, ...), indices (nnz,) int64 into batch * seqlen, cu_seqlens (batch + 1,) int32,
        the longest length, seqused (batch,) int32: valid tokens only).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lens = kept.sum(dim=-1, dtype=torch.int32)
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = int(lens.max()) if lens.numel() else 0
    cu_seqlens = F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, longest, seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack a padded batch in which a row of the batch holds several sequences, one behind the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) integers: the lengths of the sequences of each batch entry,
            then zeros.

    Returns:
        (hidden_states (nnz, ...), indices (nnz,), cu_seqlens of all sequences int32, the longest length).
    """
    seqlen = attention_mask_in_length.shape[1]
    filled = attention_mask_in_length.sum(dim=-1)
    place = torch.arange(seqlen, device=filled.device)
    indices = (place < filled[:, None]).flatten().nonzero().flatten()
    lens = attention_mask_in_length.flatten()
    lens = lens[lens > 0].to(torch.int32)
    longest = int(lens.max()) if lens.numel() else 0
    cu_seqlens = F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(nnz, ...) back at `indices` of (batch, seqlen, ...); padding is 0."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
