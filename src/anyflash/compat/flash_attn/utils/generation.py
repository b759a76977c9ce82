"""`flash_attn.utils.generation`: what a layer needs to know while it generates."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class InferenceParams:
    """State shared by the layers of a model.

    max_seqlen, max_batch_size   the cache's extents
    seqlen_offset                tokens that the cache holds; the caller advances it
    batch_size_offset            first cache row of this batch
    key_value_memory_dict        layer_idx to its cache (batch, max_seqlen, 2, key heads, D)
    lengths_per_sample           (batch,) int32 where sequences differ in length; None for seqlen_offset
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start again with an empty cache of other extents."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
