"""Compiled workers that the pool tests run, and a check that can also run in a child process."""

from __future__ import annotations

import ctypes

import numpy as np

from anyflash.kernels.llvm import engine, pool
from anyflash.kernels.llvm.target import host_target

# args: [next task, number of tasks, ptr counts, ptr owners, spin per task]
_IR = """
define void @tasks(ptr %args, i64 %thread) {
entry:
  %p.n = getelementptr i64, ptr %args, i64 1
  %p.counts = getelementptr i64, ptr %args, i64 2
  %p.owners = getelementptr i64, ptr %args, i64 3
  %p.spin = getelementptr i64, ptr %args, i64 4
  %n = load i64, ptr %p.n
  %counts = load ptr, ptr %p.counts
  %owners = load ptr, ptr %p.owners
  %spin = load i64, ptr %p.spin
  br label %next
next:
  %i = atomicrmw add ptr %args, i64 1 monotonic
  %more = icmp slt i64 %i, %n
  br i1 %more, label %wait, label %end
wait:
  %t = phi i64 [0, %next], [%t.next, %wait]
  %look = load volatile i64, ptr %p.spin
  %t.next = add i64 %t, 1
  %again = icmp slt i64 %t.next, %spin
  br i1 %again, label %wait, label %do
do:
  %c = getelementptr i64, ptr %counts, i64 %i
  %old = load i64, ptr %c
  %new = add i64 %old, 1
  store i64 %new, ptr %c
  %o = getelementptr i64, ptr %owners, i64 %i
  store i64 %thread, ptr %o
  br label %next
end:
  ret void
}

; Thread t waits until all have come, then stores x + x, for a denormal x, in slot t of the array behind
; args[2].
define void @together(ptr %args, i64 %thread) {
entry:
  %p.n = getelementptr i64, ptr %args, i64 1
  %p.out = getelementptr i64, ptr %args, i64 2
  %n = load i64, ptr %p.n
  %out = load ptr, ptr %p.out
  %came = atomicrmw add ptr %args, i64 1 seq_cst
  br label %wait
wait:
  %now = load atomic i64, ptr %args acquire, align 8
  %all = icmp sge i64 %now, %n
  br i1 %all, label %do, label %wait
do:
  %at = getelementptr float, ptr %out, i64 %thread
  %x = load volatile float, ptr %at
  %y = fadd float %x, %x
  store float %y, ptr %at
  ret void
}

declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define void @read_mxcsr(ptr %p) {
  call void @llvm.x86.sse.stmxcsr(ptr %p)
  ret void
}
define void @write_mxcsr(ptr %p) {
  call void @llvm.x86.sse.ldmxcsr(ptr %p)
  ret void
}
"""
_NAMES = ("tasks", "together", "read_mxcsr", "write_mxcsr")


def code() -> engine.Kernel:
    if host_target().arch == "x86":
        return engine.compile_module(_IR, host_target(), None, _NAMES)
    return engine.compile_module(_IR[: _IR.index("declare")], host_target(), None, _NAMES[:2])


def run_tasks(threads: int, tasks: int = 64, spin: int = 200) -> np.ndarray:
    """Run `tasks` tasks on a team; each must have been done exactly once. Returns which thread did which."""
    counts = np.zeros(tasks, np.int64)
    owners = np.full(tasks, -1, np.int64)
    args = np.array([0, tasks, counts.ctypes.data, owners.ctypes.data, spin], np.int64)
    pool.run(code().addresses["tasks"], args.ctypes.data, threads)
    assert (counts == 1).all(), counts
    assert owners.min() >= 0 and owners.max() < threads
    return owners


def run_together(threads: int, values: np.ndarray) -> np.ndarray:
    """Every thread doubles its own element of `values` (float32)."""
    values = values.copy()
    args = np.array([0, threads, values.ctypes.data], np.int64)
    pool.run(code().addresses["together"], args.ctypes.data, threads)
    return values


def mxcsr() -> int:
    value = ctypes.c_uint32()
    code().function("read_mxcsr", ctypes.c_void_p)(ctypes.addressof(value))
    return value.value


def set_mxcsr(value: int) -> None:
    word = ctypes.c_uint32(value)
    code().function("write_mxcsr", ctypes.c_void_p)(ctypes.addressof(word))


def child() -> int:
    """What a child process does: 0 if the pool works in it."""
    run_tasks(3)
    run_tasks(2)
    return 0
