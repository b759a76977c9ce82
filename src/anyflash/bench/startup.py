"""How long the first call of a problem takes: with nothing compiled, and in a new process with kernels on
disk."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

_REPEATS = 3
_CHILD = """
import json, time
import numpy as np
import anyflash as af
q = np.ones((1, 256, 4, 64), np.float32)
start = time.perf_counter()
import llvmlite.binding
loaded = time.perf_counter()
af.attention(q, q, q, causal=True)
print(json.dumps([loaded - start, time.perf_counter() - loaded]))
"""


def measure() -> dict[str, Any]:
    """Medians over new processes, in seconds: `compile` and `cached`, the first call of causal attention on
    numpy arrays without and with its kernel on disk; `load_llvm`, importing LLVM before it."""
    compiling, cached, loading = [], [], []
    for _ in range(_REPEATS):
        with tempfile.TemporaryDirectory() as directory:
            compiling.append(_first_call(directory)[1])
            load, call = _first_call(directory)
            cached.append(call)
            loading.append(load)
    return {
        "compile": statistics.median(compiling),
        "cached": statistics.median(cached),
        "load_llvm": statistics.median(loading),
    }


def _first_call(cache: str) -> tuple[float, float]:
    environment = {
        **os.environ,
        "ANYFLASH_CACHE_DIR": cache,
        "ANYFLASH_CACHE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], env=environment, capture_output=True, text=True, check=True
    )
    load, call = json.loads(done.stdout)
    return load, call
