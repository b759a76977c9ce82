"""How many threads a call may use on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from anyflash.core import settings

_UNLIMITED = 1 << 16


def _no_opinion() -> int | None:
    return None


_provider: Callable[[], int | None] = _no_opinion


def num_threads(hint: int | None = None) -> int:
    """ANYFLASH_NUM_THREADS, else `hint`, else what the framework in use says, else the usable cores."""
    return settings.num_threads() or hint or _provider() or usable_cores()


def set_provider(provider: Callable[[], int | None]) -> None:
    """Ask `provider` (torch.get_num_threads, say) for the number of threads of a call; None: no opinion."""
    global _provider
    _provider = provider


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, and on Linux its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores: int = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, _quota()))


@functools.cache
def _quota() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return _UNLIMITED if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return _UNLIMITED
