"""Handing work to threads: every task once, from any thread, nested, and without deadlock."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from anyflash.core import threads as core_threads
from anyflash.kernels.llvm import pool
from anyflash.kernels.llvm.target import host_target
from engine import workers

_X86 = pytest.mark.skipif(host_target().arch != "x86", reason="MXCSR is an x86 register")
_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("tasks", [0, 1, 2, 1000])
def test_every_task_is_done_once(threads: int, tasks: int) -> None:
    for _ in range(20):
        if tasks:
            workers.run_tasks(threads, tasks)
        else:
            pool.run(workers.code().addresses["tasks"], np.zeros(5, np.int64).ctypes.data, threads)


def test_all_threads_of_a_team_work_at_the_same_time() -> None:
    for threads in (2, 4, 7):
        assert (
            workers.run_together(threads, np.arange(threads, dtype=np.float32)) == 2 * np.arange(threads)
        ).all()


def test_many_runs_in_a_row() -> None:
    for index in range(2000):
        workers.run_tasks(2 + index % 3, 4, spin=0)


def test_sixteen_python_threads() -> None:
    def work(seed: int) -> int:
        for index in range(40):
            workers.run_tasks(1 + (seed + index) % 4, 32)
        return 1

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(work, range(16), timeout=120)) == 16


def test_nested_calls_work_alone() -> None:
    inner: list[int] = []

    @_WORKER
    def outer(args: int, thread: int) -> None:
        with pool.lease(4) as team:
            inner.append(team.size)
        if thread == 0:
            workers.run_tasks(4)

    pool.run(ctypes.cast(outer, ctypes.c_void_p).value or 0, 0, 2)
    assert inner and set(inner) == {1}
    with pool.lease(2) as team:
        assert team.size == 2


def test_an_exception_gives_the_pool_back() -> None:
    with pytest.raises(ZeroDivisionError), pool.lease(2):
        raise ZeroDivisionError
    with pool.lease(2) as team:
        assert team.size == 2


def test_a_system_without_further_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    workers.run_tasks(2)
    monkeypatch.setattr(pool._Pool, "_add_worker", lambda self: False)
    have = pool.report()["workers"]
    with pool.lease(have + 5) as team:
        assert team.size == have + 1
    workers.run_tasks(have + 5)


def test_idle_workers_use_no_processor_time() -> None:
    workers.run_tasks(4)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYFLASH_NUM_THREADS", raising=False)
    monkeypatch.setattr(core_threads, "_provider", lambda: None)
    assert core_threads.num_threads() == core_threads.usable_cores() >= 1
    assert core_threads.num_threads(3) == 3
    core_threads.set_provider(lambda: 5)
    assert core_threads.num_threads() == 5
    assert core_threads.num_threads(3) == 3
    monkeypatch.setenv("ANYFLASH_NUM_THREADS", "7")
    assert core_threads.num_threads(3) == 7


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", core_threads._UNLIMITED), ("150000 100000", 2), ("junk", core_threads._UNLIMITED)],
)
def test_cgroup_quota(monkeypatch: pytest.MonkeyPatch, text: str, cores: int) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    core_threads._quota.cache_clear()
    try:
        assert core_threads._quota() == cores
    finally:
        monkeypatch.undo()
        core_threads._quota.cache_clear()


@_X86
def test_floating_point_environment_is_the_callers() -> None:
    """Denormals survive unless the caller flushes them, on all threads alike, and MXCSR is as it was."""
    tiny = np.full(4, np.finfo(np.float32).smallest_subnormal, np.float32)
    flush = 0x8040
    clean = workers.mxcsr() & ~0x3F
    assert not clean & flush
    assert (workers.run_together(4, tiny) == 2 * tiny).all()
    workers.set_mxcsr(clean | flush)
    try:
        flushed = workers.run_together(4, tiny).tobytes()
        inside = workers.mxcsr()
    finally:
        workers.set_mxcsr(clean)
    assert flushed == bytes(16)
    assert inside & ~0x3F == clean | flush
    assert (workers.run_together(4, tiny) == 2 * tiny).all()
    assert workers.mxcsr() & ~0x3F == clean


def test_workers_leave_signals_to_python() -> None:
    script = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from engine import workers
workers.run_tasks(8)
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
start = time.monotonic()
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
time.sleep(0.05)
signal.pause()
assert got and time.monotonic() - start < 5
"""
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parents[1])], check=True, timeout=60)


def test_exit_while_threads_are_working() -> None:
    script = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from engine import workers
def forever():
    while True:
        workers.run_tasks(4, 256, 2000)
for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
"""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parents[1])],
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and not done.stderr, done


def test_run_releases_the_interpreter() -> None:
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    workers.run_tasks(1, 16, 10_000_000)
    end = time.perf_counter()
    stop.set()
    ticker.join()
    assert sum(start < at < end for at in ticks) >= min(5, (end - start) / 0.02)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)
def test_workers_keep_off_the_callers_processor() -> None:
    """Wherever the caller runs, and also after it was moved. The system may move it at any time, so that the
    processor is the one the pool found it on."""
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
from anyflash.kernels.llvm import pool
from engine import workers
before, everywhere = set(os.listdir("/proc/self/task")), os.sched_getaffinity(0)
for processor in [*sorted(everywhere)[:2], min(everywhere)]:
    os.sched_setaffinity(0, {processor})
    os.sched_setaffinity(0, everywhere)
    workers.run_tasks(2)
    (worker,) = (int(thread) for thread in set(os.listdir("/proc/self/task")) - before)
    found = pool._pool._kept_clear
    assert found in everywhere and os.sched_getaffinity(worker) == everywhere - {found}
os.sched_setaffinity(0, {max(everywhere)})
workers.run_tasks(2)
assert os.sched_getaffinity(worker) == everywhere - {found}
"""
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parents[1])], check=True, timeout=60)
