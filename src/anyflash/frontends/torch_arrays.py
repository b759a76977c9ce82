"""torch tensors as views, and new tensors for results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyflash.core.device import CPU, Device
from anyflash.core.dtypes import FLOATS8, ITEMSIZE, result
from anyflash.core.view import View
from anyflash.semantics.operands import Results

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEMSIZE}
_ELEMENTS: dict[torch.dtype, tuple[str, int]] = {
    dtype: (name, ITEMSIZE[name]) for name, dtype in DTYPES.items()
}
# Of results, where it is not that of q.
_RESULTS = {DTYPES[name]: DTYPES[result(name)] for name in FLOATS8}
_STRIDED = torch.strided
_KINDS = {"cuda": "hip" if torch.version.hip else "cuda", "mps": "metal"}
_devices: dict[torch.device, Device] = {torch.device("cpu"): CPU}


def dtype_name(tensor: Tensor) -> str:
    """The element type's name; one that anyflash lacks keeps torch's, and `describe` refuses that."""
    found = _ELEMENTS.get(tensor.dtype)
    return found[0] if found is not None else str(tensor.dtype).removeprefix("torch.")


def view(tensor: Tensor) -> View:
    """The memory of a tensor. One without strides (sparse) has a dtype that says so and that nobody takes."""
    element = _ELEMENTS.get(tensor.dtype)
    if element is None or tensor.layout is not _STRIDED:
        return _unusable(tensor)
    name, size = element
    device = tensor.device
    return View(
        tensor.data_ptr(),
        tensor.shape,
        _in_bytes(tensor.stride(), size),
        name,
        _devices.get(device) or _new_device(device),
        True,
        tensor,
    )


@lru_cache(maxsize=4096)
def _in_bytes(steps: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple([step * size for step in steps])


def _unusable(tensor: Tensor) -> View:
    dtype, shape = dtype_name(tensor), tuple(tensor.shape)
    if tensor.layout is not _STRIDED:
        dtype = f"{dtype} in layout {tensor.layout}"
    return View(None, shape, (0,) * len(shape), dtype, _new_device(tensor.device), False, tensor)


def _new_device(device: torch.device) -> Device:
    found = _devices[device] = Device(_KINDS.get(device.type, device.type), device.index or 0)
    return found


def empty(shape: tuple[int, ...], dtype: str, like: Tensor) -> tuple[Tensor, View]:
    """A new row-major tensor on the device of `like`, and its view."""
    array = like.new_empty(shape, dtype=DTYPES[dtype])
    return array, view(array)


def integers(values: NDArray[np.int32], like: Tensor) -> Tensor:
    """A new tensor of these values on the device of `like`, which the host does not wait for."""
    made = torch.tensor(values)
    if like.device.type != "cuda":
        return made.to(like.device)
    # From pinned memory the copy is queued; torch keeps that memory until it is done.
    return made.pin_memory().to(like.device, non_blocking=True)


def statistic(tensor: Tensor) -> torch.dtype:
    """The dtype of lse and of sums over rows."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


class _Form(NamedTuple):
    """Shapes and strides, in elements, of the results of a call."""

    out: tuple[int, ...]
    out_strides: tuple[int, ...]
    lse: tuple[int, ...]
    lse_strides: tuple[int, ...]
    stats: tuple[int, ...]
    stats_strides: tuple[int, ...]


def _form(layout: str, q_shape: tuple[int, ...], dim: int) -> _Form:
    """The form of results for a query of `q_shape` in `layout` and values of `dim`; extents may be symbolic.

    "bhsd" memory is ordered as "bshd", as torch's own attention does: the transpose and reshape that follow
    an attention layer then cost nothing.
    """
    if layout == "thd":
        total, heads, _ = q_shape
        rows, lse, lse_strides = heads * total, (heads, total), (total, 1)
        out, out_strides = (total, heads, dim), (heads * dim, dim, 1)
    else:
        batch, seqlen, heads, _ = q_shape if layout == "bshd" else _swapped(q_shape)
        each = heads * seqlen
        rows, lse, lse_strides = batch * each, (batch, heads, seqlen), (each, seqlen, 1)
        out, out_strides = (batch, seqlen, heads, dim), (each * dim, heads * dim, dim, 1)
        if layout == "bhsd":
            out, out_strides = _swapped(out), _swapped(out_strides)
    return _Form(out, out_strides, lse, lse_strides, (2, *lse), (rows, *lse_strides))


_known_form = lru_cache(maxsize=4096)(_form)


def _swapped(axes: Sequence[int]) -> tuple[int, ...]:
    return axes[0], axes[2], axes[1], axes[3]


def fake_results(layout: str, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New (out, lse, stats) of a call from shapes alone, which may be symbolic."""
    return _new_results(_form(layout, tuple(q.shape), v.shape[-1]), q)


def new_results(layout: str, q: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Results]:
    """New (out, lse, stats) of a call, and their views in canonical axes."""
    form = _known_form(layout, q.shape, v.shape[-1])
    made = _new_results(form, q)
    out = view(made[0])
    return made, Results(out.permute((0, 2, 1, 3)) if layout == "bhsd" else out, view(made[1]), view(made[2]))


def _new_results(form: _Form, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistic(q)
    # With strides, because torch takes a third longer to make a tensor without them.
    return (
        q.new_empty_strided(form.out, form.out_strides, dtype=_RESULTS.get(q.dtype)),
        q.new_empty_strided(form.lse, form.lse_strides, dtype=dtype),
        q.new_empty_strided(form.stats, form.stats_strides, dtype=dtype),
    )
