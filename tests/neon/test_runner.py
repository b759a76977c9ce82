"""The road to AArch64: emit, link, emulate, and get the memory back."""

from __future__ import annotations

import numpy as np
import pytest

from neon import runner

pytestmark = pytest.mark.skipif(runner.missing() is not None, reason=str(runner.missing()))

# args: [ptr values, number, ptr table of pointers]; doubles each float32, and bumps the word each pointer
# names
_IR = """
@two = internal constant <4 x float> <float 2.0, float 2.0, float 2.0, float 2.0>
define void @double(ptr %args, i64 %thread) {
entry:
  %values = load ptr, ptr %args
  %p.n = getelementptr i64, ptr %args, i64 1
  %n = load i64, ptr %p.n
  %p.table = getelementptr i64, ptr %args, i64 2
  %table = load ptr, ptr %p.table
  %slot = getelementptr ptr, ptr %table, i64 %thread
  %word = load ptr, ptr %slot
  %old = atomicrmw add ptr %word, i64 1 seq_cst
  %first = icmp eq i64 %thread, 0
  br i1 %first, label %loop, label %end
loop:
  %i = phi i64 [0, %entry], [%i.next, %loop]
  %at = getelementptr float, ptr %values, i64 %i
  %x = load <4 x float>, ptr %at, align 4
  %f = load <4 x float>, ptr @two
  %y = fmul <4 x float> %x, %f
  store <4 x float> %y, ptr %at, align 4
  %i.next = add i64 %i, 4
  %more = icmp slt i64 %i.next, %n
  br i1 %more, label %loop, label %end
end:
  ret void
}
"""

_MEMORY = """
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memmove.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
define void @shuffle(ptr %args, i64 %thread) {
  %a = load ptr, ptr %args
  %p.n = getelementptr i64, ptr %args, i64 1
  %n = load i64, ptr %p.n
  %up = getelementptr i8, ptr %a, i64 3
  %far = getelementptr i8, ptr %a, i64 100
  %farther = getelementptr i8, ptr %a, i64 200
  call void @llvm.memcpy.p0.p0.i64(ptr %far, ptr %a, i64 %n, i1 false)
  call void @llvm.memset.p0.i64(ptr %farther, i8 7, i64 %n, i1 false)
  call void @llvm.memmove.p0.p0.i64(ptr %up, ptr %a, i64 %n, i1 false)
  %up2 = getelementptr i8, ptr %far, i64 5
  call void @llvm.memmove.p0.p0.i64(ptr %far, ptr %up2, i64 %n, i1 false)
  ret void
}
"""


def test_values_pointers_and_threads() -> None:
    values = np.arange(1000, dtype=np.float32)
    words = bytes(24)
    table = bytes(24)
    patches = {runner.Pointer(2, 8 * i): runner.Pointer(1, 8 * i) for i in range(3)}
    doubled, bumped, _ = runner.run(
        _IR,
        "double",
        [values.tobytes(), words, table],
        [runner.Pointer(0), values.size, runner.Pointer(2)],
        threads=3,
        patches=patches,
    )
    assert (np.frombuffer(doubled, np.float32) == 2 * values).all()
    assert np.frombuffer(bumped, np.int64).tolist() == [1, 1, 1]


def test_memory_functions() -> None:
    content = bytes(range(40)) + bytes(260)
    expected = bytearray(content)
    expected[100:140] = content[:40]
    expected[200:240] = b"\x07" * 40
    expected[3:43] = content[:40]
    expected[100:140] = bytes(expected[105:145])
    (after,) = runner.run(_MEMORY, "shuffle", [content], [runner.Pointer(0), 40])
    assert after == bytes(expected)


def test_a_crash_is_reported() -> None:
    ir = "define void @f(ptr %args, i64 %t) {\n %p = load ptr, ptr %args\n store i64 1, ptr %p\n ret void\n}"
    with pytest.raises(RuntimeError, match="f ended with status"):
        runner.run(ir, "f", [], [8])


def test_an_instruction_beyond_the_baseline_is_reported() -> None:
    bfmmla, ret = 0x6E40EC00, 0xD65F03C0
    ir = f'@g = constant [2 x i32] [i32 {bfmmla}, i32 {ret}], section ".text.g", align 4\n'
    ir += "define void @f(ptr %args, i64 %t) {\n call void @g()\n ret void\n}"
    with pytest.raises(RuntimeError, match="f ended with status"):
        runner.run(ir, "f", [], [])


def test_a_call_into_libm_is_reported() -> None:
    ir = """
declare float @llvm.exp.f32(float)
define void @f(ptr %args, i64 %t) {
  %x = load float, ptr %args
  %y = call float @llvm.exp.f32(float %x)
  store float %y, ptr %args
  ret void
}
"""
    with pytest.raises(RuntimeError, match="calls expf"):
        runner.run(ir, "f", [], [0])


def test_missing_tools_name_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_linker", lambda: None)
    monkeypatch.setattr(runner, "_emulator", lambda: None)
    with pytest.raises(runner.MissingTools, match="binutils-aarch64-linux-gnu"):
        runner.run(_IR, "double", [], [])
