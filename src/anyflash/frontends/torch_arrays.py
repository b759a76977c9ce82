"""torch tensors as views, and new tensors for results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyflash.core.device import CPU, Device
from anyflash.core.dtypes import ITEMSIZE
from anyflash.core.view import View

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEMSIZE}
_ELEMENTS: dict[torch.dtype, tuple[str, int]] = {
    dtype: (name, ITEMSIZE[name]) for name, dtype in DTYPES.items()
}
_KINDS = {"cuda": "hip" if torch.version.hip else "cuda", "mps": "metal"}
_devices: dict[torch.device, Device] = {torch.device("cpu"): CPU}


def dtype_name(tensor: Tensor) -> str:
    """The element type's name; one that anyflash lacks keeps torch's, and `describe` refuses that."""
    found = _ELEMENTS.get(tensor.dtype)
    return found[0] if found is not None else str(tensor.dtype).removeprefix("torch.")


def view(tensor: Tensor) -> View:
    """The memory of a tensor. One without strides (sparse) has a dtype that says so and that nobody takes."""
    element = _ELEMENTS.get(tensor.dtype)
    if element is None or tensor.layout is not torch.strided:
        return _unusable(tensor)
    name, size = element
    device = tensor.device
    return View(
        tensor.data_ptr(),
        tuple(tensor.shape),
        tuple([step * size for step in tensor.stride()]),
        name,
        _devices.get(device) or _new_device(device),
        True,
        tensor,
    )


def _unusable(tensor: Tensor) -> View:
    dtype, shape = dtype_name(tensor), tuple(tensor.shape)
    if tensor.layout is not torch.strided:
        dtype = f"{dtype} in layout {tensor.layout}"
    return View(None, shape, (0,) * len(shape), dtype, _new_device(tensor.device), False, tensor)


def _new_device(device: torch.device) -> Device:
    found = _devices[device] = Device(_KINDS.get(device.type, device.type), device.index or 0)
    return found


def statistic(tensor: Tensor) -> torch.dtype:
    """The dtype of lse and of sums over rows."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def empty_results(layout: str, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New (out, lse, stats) of a call: real, fake or symbolic as q is.

    "bhsd" memory is ordered as "bshd", as torch's own attention does: the transpose and reshape that follow
    an attention layer then cost nothing.
    """
    shape: Sequence[Any] = q.shape
    dim = v.shape[-1]
    if layout == "bhsd":
        batch, heads, seqlen, _ = shape
        strides = (seqlen * heads * dim, dim, heads * dim, 1)
        out = q.new_empty_strided((batch, heads, seqlen, dim), strides)
        rows = (batch, heads, seqlen)
    elif layout == "thd":
        total, heads, _ = shape
        out = q.new_empty((total, heads, dim))
        rows = (heads, total)
    else:
        batch, seqlen, heads, _ = shape
        out = q.new_empty((batch, seqlen, heads, dim))
        rows = (batch, heads, seqlen)
    dtype = statistic(q)
    return out, q.new_empty(rows, dtype=dtype), q.new_empty((2, *rows), dtype=dtype)
