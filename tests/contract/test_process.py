"""A call leaves the process as it was: floating-point mode, random generators, environment, modules,
threads."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from anyflash.contract.backends import present
from contract.calls import BITWISE, PROGRAMS, operands, run

each_backend = pytest.mark.parametrize("backend", present())
DENORMAL = np.float32(1e-40)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setenv("ANYFLASH_NUM_THREADS", "2")


def call(backend, **keywords):
    return run(backend, operands("float32", (2, 40), (2, 60)), **keywords)


def keeps_denormals():
    """Neither flushed as results nor read as zero."""
    return DENORMAL * np.float32(0.5) != 0 and DENORMAL * np.float32(1e20) != 0


def rounding_mode():
    return ctypes.CDLL(None).fegetround()


@each_backend
@pytest.mark.parametrize("program", PROGRAMS)
def test_floating_point_mode(backend, program):
    before = rounding_mode()
    seen = []
    thread = threading.Thread(target=lambda: (call(backend), seen.append(keeps_denormals())))
    thread.start()
    thread.join()
    call(backend, **PROGRAMS[program])
    assert keeps_denormals()
    assert seen == [True]
    assert rounding_mode() == before


@pytest.mark.parametrize("backend", BITWISE)
def test_denormals_go_through(backend):
    """q = 0 over four keys: the mean of four equal denormals is exactly that denormal."""
    q, k = np.zeros((1, 20, 1, 8), np.float32), np.zeros((1, 4, 1, 8), np.float32)
    v = np.full((1, 4, 1, 8), DENORMAL * 4)
    found = run(backend, {"q": q, "k": k, "v": v})
    assert (found["out"] == v[0, 0, 0, 0]).all()


@each_backend
def test_random_generators(backend):
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]
    call(backend, dropout_p=0.5, seed=1)
    after = random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]
    assert before == after


@each_backend
def test_environment_folder_signals_and_numpy_errors(backend):
    def state():
        handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return dict(os.environ), os.getcwd(), handlers, blocked, np.geterr(), sys.getswitchinterval()

    before = state()
    call(backend, dropout_p=0.5, seed=1)
    assert state() == before


@each_backend
def test_python_threads(backend):
    before = threading.active_count()
    call(backend)
    assert threading.active_count() == before


@each_backend
def test_no_framework_is_imported(backend):
    """In a process that uses numpy alone."""
    script = f"""
import sys
import numpy as np
import anyflash as af
x = np.ones((1, 4, 2, 8), np.float32)
af.attention(x, x, x, causal=True, backend={backend!r})
print(*sorted({{"torch", "jax", "paddle", "mlx", "triton", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
