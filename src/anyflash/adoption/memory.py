"""The peak memory of one step: how far resident memory rises above where it stood before.

On Linux the kernel keeps the peak and can be told to start afresh, so nothing between two samples is missed.
Elsewhere a thread samples. Freed memory that the allocator still holds would hide a rise, so it is given back
first and, while measuring, every large array is mapped by itself.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LARGE = 1 << 16
_SAMPLE_SECONDS = 0.001


def method() -> str:
    """How `peak_rise` measures here, for the page."""
    if _has_kernel_peak():
        return "peak resident memory of the process (VmHWM, reset before the step) less that before the step"
    return f"resident memory sampled every {1e3 * _SAMPLE_SECONDS:g} ms during the step, less that before it"


def peak_rise(step: Callable[[], object]) -> int:
    """Bytes by which resident memory rose at most while `step` ran.

    Run the step once before, so that lazily made things (compiled kernels, thread pools) are not counted.
    """
    with _separate_mappings():
        gc.collect()
        _give_back()
        if _has_kernel_peak():
            _CLEAR.write_text("5")
            before = _status("VmRSS")
            kept = step()
            peak = _status("VmHWM")
        else:
            before, peak, kept = _sampled(step)
        del kept
    return max(peak - before, 0)


def _has_kernel_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"{_STATUS} has no {field}")


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _give_back() -> None:
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def _separate_mappings() -> Iterator[None]:
    """Arrays over 64 KiB get a mapping of their own, returned when freed. glibc's default thresholds come
    back."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
            libc.mallopt(_M_TRIM_THRESHOLD, 1 << 26)


def _sampled(step: Callable[[], object]) -> tuple[int, int, object]:
    import psutil

    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(_SAMPLE_SECONDS)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        kept = step()
    finally:
        done.set()
        watcher.join()
    return before, max(peak, process.memory_info().rss), kept
