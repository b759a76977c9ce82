"""Memory beyond the arrays of a call grows with the lengths, never with their product.

tracemalloc sees every allocation of Python and numpy, the CPU kernels' working memory among them. What the
system saw is checked in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from anyflash.contract.direct import attend
from anyflash.contract.poison import numpy_dtype
from anyflash.core.dtypes import accumulate
from anyflash.kernels.llvm import scratch
from contract.calls import BITWISE, results

SHORT, LONG = 512, 4096
HEADS, DIM = 2, 64

CALLS = {
    "plain": lambda n: {},
    "causal": lambda n: {"causal": True},
    "window": lambda n: {"window": (100, 100)},
    "function": lambda n: {
        "score": lambda s, at: s - abs(at.q - at.k) * 0.01,
        "mask": lambda at: at.k != at.row,
    },
    "bias": lambda n: {"bias": np.zeros((1, HEADS, 1, n), np.float32)},
    "slopes": lambda n: {"alibi_slopes": np.full(HEADS, 0.1, np.float32)},
    "dropout": lambda n: {"dropout_p": 0.5},
    "sinks": lambda n: {"sinks": np.zeros(HEADS, np.float32)},
}


def extra(backend, call, dtype, n, backward):
    """Peak bytes of a warm call beyond its arguments and results."""
    *arrays, dout = (np.ones((1, n, HEADS, DIM), numpy_dtype(dtype)) for _ in range(4))
    dout = dout if backward else None
    keywords = CALLS[call](n)
    attend(backend, *arrays, dout=dout, **keywords)
    scratch.free_scratch()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        found = attend(backend, *arrays, dout=dout, **keywords)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    stats = 2 * found.lse.nbytes
    return peak - stats - sum(array.nbytes for array in results(found).values())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BITWISE)
def test_grows_with_the_length(backend, call, dtype, direction):
    backward = direction == "backward"
    short, long = (extra(backend, call, dtype, n, backward) for n in (SHORT, LONG))
    # Whatever a call needs for each token fits into the size of its own arrays in the type of the sums.
    arrays = (8 if backward else 4) * HEADS * DIM * np.dtype(accumulate(dtype)).itemsize
    assert long - short <= (LONG - SHORT) * arrays, "more for each token than its own arrays have"
    assert long <= short * LONG / SHORT, "grows faster than the length"


SCRIPT = f"""
import numpy as np
from pathlib import Path
from anyflash.contract.direct import attend

def status(name):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(name + ":")[1].split()[0])

def call(n):
    arrays = [np.ones((1, n, {HEADS}, {DIM}), np.float32) for _ in range(4)]
    before = status("VmRSS")
    found = attend("BACKEND", *arrays[:3], dout=arrays[3], causal=True)
    return status("VmHWM") - before

call(64)
print(call({2 * LONG}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("backend", BITWISE)
def test_peak_that_the_system_saw(backend):
    """Results and working memory together, of a length whose score matrices would take 512 MiB."""
    script = SCRIPT.replace("BACKEND", backend)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    array = 2 * LONG * HEADS * DIM * 4
    scores = HEADS * (2 * LONG) ** 2 * 4
    assert int(done.stdout) <= 16 * array
    assert 16 * array <= scores / 8
