"""Working memory of the CPU kernels: reused from call to call, aligned, counted."""

from __future__ import annotations

import ctypes
import threading
import weakref

import numpy as np

ALIGNMENT = 64
_PAGE = 4096
# More than this is given back after the call that needed it.
KEEP_BYTES = 32 << 20
_GUARD_BYTES = 256
_NAN_BYTE = 0xFF  # every float type reads a run of these as NaN

_poisoned = False
_all: weakref.WeakSet[Buffer] = weakref.WeakSet()
_all_lock = threading.Lock()


class Buffer:
    """Memory that grows as needed and keeps its contents only until `reserve` is called again."""

    __slots__ = ("__weakref__", "_address", "_guard", "_memory", "in_use", "nbytes")

    def __init__(self) -> None:
        self._memory: np.ndarray | None = None
        self._address = self.nbytes = 0
        self._guard: int | None = None
        self.in_use = False
        with _all_lock:
            _all.add(self)

    def reserve(self, nbytes: int) -> int:
        """The address, a multiple of 64, of at least `nbytes` bytes that nobody has initialised."""
        need = nbytes + ALIGNMENT + (_GUARD_BYTES if _poisoned else 0)
        if self.nbytes < need:
            self.free()
            self._memory = np.empty(-(-need // _PAGE) * _PAGE, np.uint8)
            self._address = -(-self._memory.ctypes.data // ALIGNMENT) * ALIGNMENT
            self.nbytes = self._memory.nbytes
        if _poisoned:
            ctypes.memset(self._address, _NAN_BYTE, nbytes + _GUARD_BYTES)
            self._guard = self._address + nbytes
        return self._address

    def release(self) -> bool:
        """End of a call. False if the memory was poisoned and something was written behind its end."""
        guard, self._guard, self.in_use = self._guard, None, False
        intact = guard is None or ctypes.string_at(guard, _GUARD_BYTES) == bytes([_NAN_BYTE]) * _GUARD_BYTES
        if self.nbytes > KEEP_BYTES:
            self.free()
        return intact

    def free(self) -> None:
        self._memory = None
        self._address = self.nbytes = 0


def scratch_bytes() -> int:
    """Bytes of working memory that this process holds for CPU kernels, in all threads."""
    with _all_lock:
        return sum(buffer.nbytes for buffer in _all)


def free_scratch() -> None:
    """Give back all working memory that no call is using."""
    with _all_lock:
        for buffer in _all:
            if not buffer.in_use:
                buffer.free()


def poison(enabled: bool) -> None:
    """For tests: fill working memory with NaN before each use, and check that none is written behind."""
    global _poisoned
    _poisoned = enabled


def after_fork() -> None:
    global _all_lock
    _all_lock = threading.Lock()
