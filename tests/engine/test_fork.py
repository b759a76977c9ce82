"""The pool and the engine after fork, in the parent and in the child."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable

import pytest

from anyflash.kernels.llvm import engine, pool
from anyflash.kernels.llvm.target import host_target
from engine import workers

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
_TIMEOUT_S = 60


def _in_fork(work: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"the child failed with status {status}"
            return
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def _compile_something_new() -> None:
    text = f"define i64 @f() {{\n ret i64 {os.getpid()}\n}}"
    engine.compile_module(text, host_target(), None, ["f"])


def test_fork_after_use() -> None:
    workers.run_tasks(4)
    _in_fork(workers.child)
    workers.run_tasks(4)


def test_fork_of_a_fork() -> None:
    workers.run_tasks(4)
    _in_fork(lambda: (workers.child(), _in_fork(workers.child), workers.child()))


def test_compile_in_a_child() -> None:
    workers.run_tasks(2)
    _in_fork(_compile_something_new)


def test_fork_while_other_threads_work_and_compile() -> None:
    stop = threading.Event()
    rounds: list[int] = []

    def busy(work: Callable[[], object]) -> None:
        while not stop.is_set():
            work()
            rounds.append(1)

    number = iter(range(10**9))

    def compile_more() -> None:
        text = f"define i64 @f() {{\n ret i64 {next(number)}\n}}"
        engine.compile_module(text, host_target(), None, ["f"])

    threads = [
        threading.Thread(target=busy, args=(work,)) for work in (lambda: workers.run_tasks(3), compile_more)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            _in_fork(lambda: (workers.child(), _compile_something_new()))
        assert all(thread.is_alive() for thread in threads)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(rounds) > 2
    assert pool.report()["workers"] >= 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method: str) -> None:
    workers.run_tasks(3)
    with multiprocessing.get_context(method).Pool(2) as processes:
        results = [processes.apply_async(workers.child) for _ in range(4)]
        assert [result.get(timeout=_TIMEOUT_S) for result in results] == [0] * 4
    workers.run_tasks(3)
