"""Fork after use, fork while other threads are in a call, fresh processes, and eight on a cold cache."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from anyflash.contract.backends import present
from stress.workers import checksum, problem

pytestmark = [
    pytest.mark.skipif("cpu" not in present(), reason="these are calls on the CPU backend"),
    pytest.mark.timeout(300),
]
TESTS = Path(__file__).resolve().parents[1]
WAIT_S = 120
COUNT = 6

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    monkeypatch.setenv("ANYFLASH_NUM_THREADS", "4")


def forked(expected):
    """A child of this process runs every problem; how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if [problem(i) for i in range(COUNT)] == expected else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_child_and_parent_after_use():
    expected = [problem(i) for i in range(COUNT)]
    assert forked(expected) == 0
    assert [problem(i) for i in range(COUNT)] == expected
    assert forked(expected) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork_while_other_threads_are_in_a_call():
    expected = [problem(i) for i in range(COUNT)]
    stop = threading.Event()

    def busy(i):
        while not stop.is_set():
            problem(i)

    threads = [threading.Thread(target=busy, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert [forked(expected) for _ in range(5)] == [0] * 5
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("method", sorted(multiprocessing.get_all_start_methods()))
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_pool_of_processes_after_use(method, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, *filter(None, sys.path)))))
    expected = [checksum(i) for i in range(COUNT)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map_async(checksum, range(COUNT)).get(timeout=WAIT_S) == expected


def test_eight_processes_on_a_cold_cache(tmp_path):
    """All start at once, compile and store the same kernels, and agree."""
    environment = {
        **os.environ,
        "ANYFLASH_CACHE_DIR": str(tmp_path),
        "ANYFLASH_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, *filter(None, sys.path)))),
    }
    script = "from stress.workers import checksum; print([checksum(i) for i in range(2)])"
    command = [sys.executable, "-c", script]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    ended = [(process.communicate(timeout=WAIT_S * 2), process.returncode) for process in running]
    assert all(code == 0 for _, code in ended), ended
    assert {out for (out, _), _ in ended} == {f"{[checksum(i) for i in range(2)]}\n"}
    assert any(tmp_path.rglob("*")), "nothing was kept in the cache"
