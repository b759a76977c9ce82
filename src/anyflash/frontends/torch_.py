"""torch tensors. Forward and backward are operators of torch (torch_op.py); this is what calls them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyflash.core import threads
from anyflash.core.errors import InvalidCall
from anyflash.core.view import View
from anyflash.frontends import torch_arrays, torch_autograd, torch_cache, torch_op, torch_vmap
from anyflash.frontends.base import Request
from anyflash.frontends.cache import CacheRequest

__all__ = ["FRONTEND", "torch_autograd", "torch_vmap"]

_DENSE = torch_op.FORWARD["attention"]
_PACKED = torch_op.FORWARD["attention_varlen"]

# Asked once, because torch 2.11 cannot compile the question.
_AUTOCAST = frozenset(
    [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)]
)

threads.set_provider(torch.get_num_threads)


class Torch:
    name = "torch"

    def owns(self, kind: type) -> bool:
        return issubclass(kind, Tensor)

    def dtype(self, array: Tensor) -> str:
        return torch_arrays.dtype_name(array)

    def view(self, array: Tensor) -> View:
        return torch_arrays.view(array)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Tensor) -> tuple[Tensor, View]:
        return torch_arrays.empty(shape, dtype, like)

    def integers(self, values: NDArray[np.int32], like: Tensor) -> Tensor:
        return torch_arrays.integers(values, like)

    def attend(self, request: Request) -> tuple[Tensor, Tensor]:
        q, k, v = request.q, request.k, request.v
        if q.is_nested or k.is_nested or v.is_nested:
            raise InvalidCall(
                "q, k, v",
                "a nested tensor",
                "dense tensors",
                "Call anyflash.attention_varlen with the values() and offsets() of nested tensors",
            )
        if torch._C._is_any_autocast_enabled():
            q, k, v = _autocast(q, k, v)
        seed = _seed(request.seed) if request.dropout else None
        tables, names = list(request.tables), ",".join(request.names)
        call = (seed, names, request.program, request.layout, request.backend)
        if request.cu_seqlens_q is None:
            out, lse, _ = _DENSE(q, k, v, tables, request.sinks, *call)
        else:
            lengths = (request.cu_seqlens_q, request.cu_seqlens_k, request.seqused_k)
            out, lse, _ = _PACKED(q, k, v, tables, request.sinks, *lengths, *call)
        return out, lse

    def attend_cache(self, request: CacheRequest) -> tuple[Tensor, Tensor]:
        if torch._C._is_any_autocast_enabled():
            request.q, *new = _autocast(*[t for t in (request.q, request.k, request.v) if t is not None])
            request.k, request.v = new or (None, None)
        return torch_cache.attend(request)

    def merge(
        self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, layout: str
    ) -> tuple[Tensor, Tensor]:
        """As `semantics.lse.merge`, from operations that torch differentiates."""
        nothing = (lse_a == -torch.inf) & (lse_b == -torch.inf)
        lse = torch.logaddexp(lse_a.masked_fill(nothing, 0.0), lse_b.masked_fill(nothing, 0.0))
        total = torch.zeros((), dtype=lse.dtype, device=lse.device)
        for out, part in ((out_a, lse_a), (out_b, lse_b)):
            empty = part == -torch.inf
            share = (part.masked_fill(empty, 0.0) - lse).exp().masked_fill(empty, 0.0)
            kept = out.to(lse.dtype).masked_fill(_along_out(empty, layout), 0.0)
            total = total + _along_out(share, layout) * kept
        return total.to(out_a.dtype), lse.masked_fill(nothing, -torch.inf).to(lse_a.dtype)


def _along_out(lse: Tensor, layout: str) -> Tensor:
    return (lse if layout == "bhsd" else lse.transpose(-1, -2)).unsqueeze(-1)


def _autocast(q: Tensor, *others: Tensor) -> list[Tensor]:
    """q, k and v in the autocast dtype, as torch's own attention takes them; 8 bytes and 8 bits stay."""
    kind = q.device.type
    tensors = [q, *others]
    if kind not in _AUTOCAST or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return [t.to(dtype) if t.is_floating_point() and t.itemsize in (2, 4) else t for t in tensors]


def _seed(seed: int | None) -> Tensor:
    """The seed as a tensor, so that a compiled call is not compiled anew for another one.

    None draws it from torch's CPU generator: torch.manual_seed reproduces it, and activation checkpointing,
    which restores that generator, drops the same elements again.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64)
    return torch.tensor(seed, dtype=torch.int64)


FRONTEND = Torch()
