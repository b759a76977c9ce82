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
    with tempfile.TemporaryDirectory() as bytecode:
        for turn in range(_REPEATS + 1):
            with tempfile.TemporaryDirectory() as kernels:
                compile_call = _first_call(kernels, bytecode)[1]
                load, cached_call = _first_call(kernels, bytecode)
            # The first turn wrote the bytecode, as installing a package does.
            if turn:
                compiling.append(compile_call)
                cached.append(cached_call)
                loading.append(load)
    return {
        "compile": statistics.median(compiling),
        "cached": statistics.median(cached),
        "load_llvm": statistics.median(loading),
    }


def _first_call(kernels: str, bytecode: str) -> tuple[float, float]:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPYCACHEPREFIX": bytecode,
        "ANYFLASH_CACHE_DIR": kernels,
        "ANYFLASH_CACHE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], env=environment, capture_output=True, text=True, check=True
    )
    load, call = json.loads(done.stdout)
    return load, call
