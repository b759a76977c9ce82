"""Counters that are zero when a launch begins, and left zero by it.

A launch adds to them, and its last arrivals set them back. So they are cleared once, and two launches may
share them if one comes behind the other. That holds for the launches of one stream, whoever makes them:
counters are kept for each thread and stream. Work that is recorded in a graph has no stream of its own: it
may be run on any, beside anything. There the counters are taken from the graph's memory and cleared by the
recording itself, whose memory no other work uses while it runs.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from anyflash.core.device import Device

if TYPE_CHECKING:
    import torch

_LEAST = 4096


class _Kept(threading.local):
    """(device, stream) -> counters.

    Memory that is let go is torch's to give out again on its stream, so behind the launches that use it.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], torch.Tensor] = {}


_kept = _Kept()


def counters(count: int, device: Device) -> torch.Tensor:
    """At least `count` int32 zeros, for one launch on the current stream of `device`."""
    import torch

    if device.kind == "cpu":
        return torch.zeros(count, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device.index}")
    key = device.index, torch.cuda.current_stream(device.index).cuda_stream
    found = _kept.found.get(key)
    if found is None or found.numel() < count:
        size = max(_LEAST, 1 << (count - 1).bit_length())
        found = torch.zeros(size, dtype=torch.int32, device=f"cuda:{device.index}")
        _kept.found[key] = found
    return found
