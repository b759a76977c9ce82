"""Compiling, linking and calling; errors; what the engine must not do to the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from anyflash.core.errors import BackendBroken
from anyflash.kernels.llvm import elf, engine, pool_ir, target

_TWICE = """
@answer = constant i64 42
@factor = internal constant [2 x double] [double 2.0, double 3.0]
define void @scale(ptr %p, i64 %which) {
  %at = getelementptr double, ptr @factor, i64 %which
  %f = load double, ptr %at
  %x = load double, ptr %p
  %y = fmul double %x, %f
  store double %y, ptr %p
  ret void
}
define void @fill(ptr %p, i64 %n) {
  call void @llvm.memset.p0.i64(ptr %p, i8 255, i64 %n, i1 false)
  ret void
}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLASH_CACHE_DIR", str(tmp_path))


def _unique(text: str, name: str) -> str:
    return f"; {name}\n{text}"


@pytest.mark.parametrize("name", [name for name in target.NAMES if target.why_not(name) is None])
def test_constants_and_memset_work_for_every_target(name: str) -> None:
    kernel = engine.compile_module(_TWICE, target.get_target(name), None, ["scale", "fill"])
    x = np.array([1.5, 0.0])
    scale = kernel.function("scale", ctypes.c_void_p, ctypes.c_int64)
    scale(x.ctypes.data, 1)
    assert x[0] == 4.5
    kernel.function("fill", ctypes.c_void_p, ctypes.c_int64)(x.ctypes.data, 16)
    assert np.isnan(x).all()


def test_a_module_carries_facts_about_itself() -> None:
    kernel = engine.compile_module(_TWICE, target.host_target(), "facts", ["scale", "answer"])
    assert kernel.integer("answer") == 42


def test_a_second_request_emits_nothing_and_gives_the_same_code() -> None:
    calls: list[int] = []

    def emit() -> str:
        calls.append(1)
        return _TWICE

    first = engine.compile_module(emit, target.host_target(), "a second request", ["scale"])
    assert engine.compile_module(emit, target.host_target(), "a second request", ["scale"]) is first
    assert len(calls) == 1


def test_sixteen_threads_compile_at_once() -> None:
    def work(index: int) -> float:
        text = _unique(_TWICE.replace("3.0", f"{index % 8}.0"), f"threads {index % 8}")
        kernel = engine.compile_module(text, target.host_target(), None, ["scale"])
        x = np.array([2.0])
        kernel.function("scale", ctypes.c_void_p, ctypes.c_int64)(x.ctypes.data, 1)
        return float(x[0])

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(work, range(32))) == [2.0 * (i % 8) for i in range(32)]


_BROKEN = {
    "text": ("define void @f( {", "parsing error"),
    "types": ("define void @f() { %x = add i32 1.0, 2\n ret void }", "invalid for type"),
    "libm": (
        (
            "declare float @llvm.sin.f32(float)\ndefine float @f(float %x) {\n"
            "%y = call float @llvm.sin.f32(float %x)\nret float %y }"
        ),
        "calls sinf",
    ),
}


@pytest.mark.parametrize("case", _BROKEN)
def test_a_module_llvm_refuses_is_saved(case: str) -> None:
    text, complaint = _BROKEN[case]
    with pytest.raises(BackendBroken, match=complaint) as caught:
        engine.compile_module(text, target.host_target(), None, ["f"])
    path = Path(str(caught.value).split("its LLVM IR is in ")[1].split(")")[0])
    assert path.read_text() == text


def test_a_missing_symbol_is_named() -> None:
    with pytest.raises(BackendBroken, match="absent"):
        engine.compile_module(_unique(_TWICE, "absent"), target.host_target(), None, ["absent"])


_STATE = """
import sys, threading
import numpy as np
sys.path.insert(0, sys.argv[1])
tiny = np.full(64, np.finfo(np.float32).smallest_subnormal)
def kept():
    return bool((tiny + tiny == 2 * np.finfo(np.float32).smallest_subnormal).all())
start, answers = threading.Event(), []
older = threading.Thread(target=lambda: (start.wait(), answers.append(kept())))
older.start()
answers.append(kept())
from engine import workers
workers.run_tasks(3)
answers.append(kept())
start.set()
older.join()
younger = threading.Thread(target=lambda: answers.append(kept()))
younger.start()
younger.join()
assert answers == [True] * 4, answers
"""


def test_importing_compiling_and_running_flushes_no_denormals() -> None:
    """In a thread that is older, one that is younger, and the one that does it all."""
    subprocess.run([sys.executable, "-c", _STATE, str(Path(__file__).parents[1])], check=True, timeout=120)


@pytest.mark.parametrize("arch", ["x86", "arm", "other"])
def test_the_thread_pool_compiles_for_each_processor(arch: target.Arch) -> None:
    instruction_set = target.get_target("neon" if arch == "arm" else "avx2" if arch == "x86" else "generic")
    data = engine.emit_object(pool_ir.pool_ir(arch), instruction_set)
    assert elf.undefined_symbols(data) == set(pool_ir.IMPORTS)
