"""The threads of the CPU kernels.

A compiled worker has the form `void worker(ptr args, i64 thread)`: every thread of a team calls it at most
once with its number, the caller as thread 0 always, and the threads share the work out among themselves by an
atomic counter in `args`. They are native threads that run compiled code only, so handing them work takes no
interpreter lock and they cannot hold up the interpreter's shutdown. There is one pool; whoever finds it taken
(another Python thread, a nested call) works alone.

    with pool.lease(num_threads()) as team:
        addresses = team.scratch(nbytes)     # one piece of working memory for each thread
        team.run(function_address, args_address)
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from anyflash.core.errors import BackendBroken
from anyflash.core.log import logger
from anyflash.core.threads import num_threads, usable_cores
from anyflash.kernels.llvm import engine, pool_ir, scratch
from anyflash.kernels.llvm.target import get_target

# How long a thread watches for work, or for the end of it, and how often the caller then yields, before it
# blocks. Longer than what lies between two calls in Python.
SPIN_SECONDS = 50e-6
YIELDS = 3000

_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


class _Pool:
    """Native threads and the memory through which they are driven. Neither is ever freed."""

    def __init__(self) -> None:
        target = get_target("generic")
        code = engine.compile_module(
            lambda: pool_ir.pool_ir(target.arch),
            target,
            "thread pool",
            pool_ir.SYMBOLS,
            {name: engine.process_address(name) for name in pool_ir.IMPORTS},
        )
        self._libc = ctypes.CDLL(None)
        self._start = code.addresses["worker"]
        self._run = code.function("run", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        spin = code.function("spin", ctypes.c_int64, ctypes.c_void_p)
        self.state = self._allocate()
        ctypes.c_int64.from_address(self.state + pool_ir.SPINS).value = _turns(spin, self.state)
        ctypes.c_int64.from_address(self.state + pool_ir.YIELDS).value = YIELDS
        self.num_workers = 0
        self.buffers: list[scratch.Buffer] = []
        self._threads: list[ctypes.c_void_p] = []
        self._kept_clear = -1
        known = hasattr(self._libc, "pthread_setaffinity_np") and hasattr(os, "sched_getaffinity")
        self._processor = getattr(self._libc, "sched_getcpu", None) if known else None

    def run(self, function: int, args: int, size: int) -> None:
        """function(args, thread) on `size` threads, of which the caller is one."""
        if self._processor is not None:
            processor = self._processor()
            if processor != self._kept_clear:
                self._keep_clear(processor)
        self._run(self.state, function, args, size)

    def _keep_clear(self, processor: int) -> None:
        """Keep workers off the caller's processor. The system likes to wake a thread where it was woken from,
        and then the two take turns on one processor while another is idle. A caller that is bound to one
        processor says nothing about the others: workers stay where they may be."""
        others = os.sched_getaffinity(0) - {processor}
        if not others:
            return
        mask = sum(1 << number for number in others).to_bytes(max(others) // 64 * 8 + 8, "little")
        for thread in self._threads:
            self._libc.pthread_setaffinity_np(thread, ctypes.c_size_t(len(mask)), mask)
        self._kept_clear = processor

    def _allocate(self) -> int:
        calloc = self._libc.calloc
        calloc.restype = ctypes.c_void_p
        block = calloc(ctypes.c_size_t(1), ctypes.c_size_t(pool_ir.STATE_BYTES + scratch.ALIGNMENT))
        if not block:
            raise MemoryError("no memory for the thread pool")
        state = -(-block // scratch.ALIGNMENT) * scratch.ALIGNMENT
        self._libc.pthread_mutex_init(ctypes.c_void_p(state + pool_ir.MUTEX), None)
        self._libc.pthread_cond_init(ctypes.c_void_p(state + pool_ir.WORK), None)
        self._libc.pthread_cond_init(ctypes.c_void_p(state + pool_ir.DONE), None)
        return state

    def grow(self, num_workers: int) -> int:
        """Have at least `num_workers` workers if the system allows; how many of them there are."""
        if self.num_workers < num_workers:
            # Signals stay with the threads that Python knows.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                while self.num_workers < num_workers and self._add_worker():
                    self.num_workers += 1
                    self.buffers.append(scratch.Buffer())
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return min(self.num_workers, num_workers)

    def _add_worker(self) -> bool:
        thread = ctypes.c_void_p()
        error = self._libc.pthread_create(
            ctypes.byref(thread), None, ctypes.c_void_p(self._start), ctypes.c_void_p(self.state)
        )
        if error:
            logger.info("the system gives no further thread (error %d); %d workers", error, self.num_workers)
            return False
        self._libc.pthread_detach(thread)
        self._threads.append(thread)
        self._kept_clear = -1
        return True


class Team:
    """The threads of one call: the caller, which is thread 0, and `size - 1` workers. A context manager."""

    __slots__ = ("_buffers", "_lock", "_pool", "_shared", "_threads", "size")

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lock: threading.Lock | None = None
        self._pool: _Pool | None = None
        self.size = 1

    def __enter__(self) -> Team:
        mine, self._shared = _own.push()
        self._buffers = (mine,)
        lock = _taken
        if self._threads > 1 and lock.acquire(blocking=False):
            self._lock = lock
            try:
                self._pool = _started()
                if self._pool:
                    self.size += self._pool.grow(self._threads - 1)
                    self._buffers += tuple(self._pool.buffers[: self.size - 1])
            except BaseException:
                _own.pop()
                lock.release()
                raise
        for buffer in self._buffers:
            buffer.in_use = True
        self._shared.in_use = True
        return self

    def __exit__(self, *_: object) -> None:
        intact = [buffer.release() for buffer in (*self._buffers, self._shared)]
        _own.pop()
        if self._lock:
            self._lock.release()
        if not all(intact):
            raise BackendBroken(
                "cpu", "using scratch memory", "a kernel wrote behind the memory it was given"
            )

    def scratch(self, nbytes: int) -> tuple[int, ...]:
        """Addresses (multiples of 64) of `nbytes` bytes for each thread, with arbitrary contents."""
        return tuple(buffer.reserve(nbytes) for buffer in self._buffers)

    def shared(self, nbytes: int) -> int:
        """The address (a multiple of 64) of `nbytes` bytes for the team together, with arbitrary contents."""
        return self._shared.reserve(nbytes)

    def run(self, function: int, args: int) -> None:
        """Call the compiled worker at `function` on every thread with `args`, and wait for all.

        A thread that wakes after thread 0 has returned is not called, so the work must be handed out by a
        counter in `args`.
        """
        if self._pool is None or self.size == 1:
            _WORKER(function)(args, 0)
        else:
            self._pool.run(function, args, self.size)


class _OwnBuffers(threading.local):
    """Working memory of one Python thread: a pair for each depth (a signal handler may call again)."""

    def __init__(self) -> None:
        self.depth = 0
        self.pairs: list[tuple[scratch.Buffer, scratch.Buffer]] = []

    def push(self) -> tuple[scratch.Buffer, scratch.Buffer]:
        if self.depth == len(self.pairs):
            self.pairs.append((scratch.Buffer(), scratch.Buffer()))
        self.depth += 1
        return self.pairs[self.depth - 1]

    def pop(self) -> None:
        self.depth -= 1


_own = _OwnBuffers()
_pool: _Pool | None = None
_taken = threading.Lock()


def lease(threads: int) -> Team:
    """A team of at most `threads` threads; of one if the pool is busy."""
    return Team(threads)


def run(function: int, args: int, threads: int) -> None:
    """Call the compiled worker at `function` on at most `threads` threads, and wait for all."""
    with lease(threads) as team:
        team.run(function, args)


def report() -> dict[str, Any]:
    """For `anyflash doctor`: threads of a call, native workers started, bytes of working memory."""
    return {
        "num_threads": num_threads(),
        "usable_cores": usable_cores(),
        "workers": _pool.num_workers if _pool else 0,
        "scratch_bytes": scratch.scratch_bytes(),
    }


def _started() -> _Pool | None:
    global _pool
    if _pool is None and hasattr(signal, "pthread_sigmask"):
        _pool = _Pool()
    return _pool


def _turns(spin: Callable[[int, int], None], watched: int) -> int:
    """Turns of the waiting loop that fill SPIN_SECONDS."""
    turns = 1000
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        spin(turns, watched)
        best = min(best, time.perf_counter() - start)
    return max(1, round(turns * SPIN_SECONDS / best))


def _after_fork() -> None:
    """A child has none of its parent's threads; locks may have been held by them."""
    global _pool, _taken, _own
    _pool = None
    _taken = threading.Lock()
    _own = _OwnBuffers()
    scratch.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
