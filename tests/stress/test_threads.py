"""Many Python threads at once, each with problems of its own."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from anyflash.contract.backends import present
from stress.workers import problem

pytestmark = [
    pytest.mark.skipif("cpu" not in present(), reason="these are calls on the CPU backend"),
    pytest.mark.timeout(300),
]
THREADS = 16
ROUNDS = 6


@pytest.fixture(scope="module")
def alone():
    return [problem(i) for i in range(THREADS)]


@pytest.mark.parametrize("threads_a_call", [1, 3, 16])
def test_sixteen_threads_with_different_problems(alone, threads_a_call, monkeypatch):
    """Same bits as alone, whoever gets the pool."""
    monkeypatch.setenv("ANYFLASH_NUM_THREADS", str(threads_a_call))
    together = threading.Barrier(THREADS)

    def work(i):
        together.wait()
        return [problem((i + r) % THREADS) for r in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        for i, found in enumerate(pool.map(work, range(THREADS))):
            for r, got in enumerate(found):
                assert got == alone[(i + r) % THREADS], (i, r)


def test_call_within_a_signal_handler(alone):
    """A handler runs between two bytecodes, also while the interrupted call holds the pool."""
    found = []
    before = signal.signal(signal.SIGALRM, lambda *_: found.append(problem(1)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        for _ in range(200):
            assert problem(0) == alone[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert found
    assert all(got == alone[1] for got in found)


def test_threads_that_end_leave_nothing(alone):
    """Each new thread brings working memory of its own, and takes it along."""
    from anyflash.kernels.llvm import scratch

    def once(i):
        thread = threading.Thread(target=problem, args=(i,))
        thread.start()
        thread.join()

    once(0)
    before = scratch.scratch_bytes()
    for _ in range(20):
        once(0)
    assert scratch.scratch_bytes() <= before
