"""The part of the thread pool that is compiled: workers never enter the Python interpreter.

One mutex guards the state; `generation` and `running` are also watched without it before a thread blocks on a
condition: by a worker for a short spin only (a longer one was measured to slow the framework's own threads),
by the caller for a further while in which it yields (waking it costs more than the end of most jobs). A job
is open while `slots` is positive: a worker that comes too late finds it closed and goes back to sleep, so the
caller waits only for workers that have begun. Whoever takes a slot wakes two more sleepers, so that many
threads start in logarithmic time.

    worker(state):           loop: wait for a new generation; take a slot; function(args, thread); report
    run(state, f, args, n):  open n - 1 slots; f(args, 0); close; wait until no worker is running
    spin(n):                 n turns of the waiting loop, to find out how long one takes

Workers adopt the floating-point environment of the caller (flush-to-zero, rounding), so that a result does
not depend on which thread computed it. The caller's own is only read.
"""

from __future__ import annotations

from anyflash.kernels.llvm.target import Arch

# Byte offsets in the state block. Mutex and conditions get more room than any known C library needs.
MUTEX, WORK, DONE = 0, 128, 256
GENERATION, RUNNING = 384, 448
SLOTS, NEXT, SLEEPERS, WAITING, FUNCTION, ARGS, FENV, SPINS, YIELDS = (512 + 8 * i for i in range(9))
STATE_BYTES = 1024

IMPORTS = (
    "pthread_mutex_lock",
    "pthread_mutex_unlock",
    "pthread_cond_wait",
    "pthread_cond_signal",
    "sched_yield",
)
SYMBOLS = ("worker", "run", "spin")

_FIELDS = {
    "mutex": MUTEX, "work": WORK, "done": DONE, "generation": GENERATION, "running": RUNNING, "slots": SLOTS,
    "next": NEXT, "sleepers": SLEEPERS, "waiting": WAITING, "function": FUNCTION, "args": ARGS, "fenv": FENV,
    "spins": SPINS, "yields": YIELDS,
}  # fmt: skip

# What differs between processors: the hint inside a waiting loop, reading and setting the floating-point
# environment.
_PROCESSOR: dict[Arch, str] = {
    "x86": """
declare void @llvm.x86.sse2.pause()
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define internal void @relax() {
  call void @llvm.x86.sse2.pause()
  ret void
}
define internal void @save_fenv(ptr %p) {
  call void @llvm.x86.sse.stmxcsr(ptr %p)
  ret void
}
define internal void @load_fenv(ptr %p) {
  call void @llvm.x86.sse.ldmxcsr(ptr %p)
  ret void
}
""",
    "arm": """
declare void @llvm.aarch64.isb(i32)
declare i64 @llvm.aarch64.get.fpcr()
declare void @llvm.aarch64.set.fpcr(i64)
define internal void @relax() {
  call void @llvm.aarch64.isb(i32 15)
  ret void
}
define internal void @save_fenv(ptr %p) {
  %v = call i64 @llvm.aarch64.get.fpcr()
  store i64 %v, ptr %p
  ret void
}
define internal void @load_fenv(ptr %p) {
  %v = load i64, ptr %p
  call void @llvm.aarch64.set.fpcr(i64 %v)
  ret void
}
""",
    "other": """
define internal void @relax() {
  fence seq_cst
  ret void
}
define internal void @save_fenv(ptr %p) {
  ret void
}
define internal void @load_fenv(ptr %p) {
  ret void
}
""",
}

_POOL = """
declare i32 @pthread_mutex_lock(ptr)
declare i32 @pthread_mutex_unlock(ptr)
declare i32 @pthread_cond_wait(ptr, ptr)
declare i32 @pthread_cond_signal(ptr)
declare i32 @sched_yield()

; The mutex is held on entry. Decides how many sleepers to wake, releases the mutex, wakes them.
define internal void @unlock_and_wake(ptr %state) {
  FIELDS
  %slots = load i64, ptr %p.slots
  %sleepers = load i64, ptr %p.sleepers
  %wanted = call i64 @llvm.smin.i64(i64 %slots, i64 %sleepers)
  %u = call i32 @pthread_mutex_unlock(ptr %p.mutex)
  %one = icmp sgt i64 %wanted, 0
  br i1 %one, label %wake.one, label %end
wake.one:
  %s1 = call i32 @pthread_cond_signal(ptr %p.work)
  %two = icmp sgt i64 %wanted, 1
  br i1 %two, label %wake.two, label %end
wake.two:
  %s2 = call i32 @pthread_cond_signal(ptr %p.work)
  br label %end
end:
  ret void
}
declare i64 @llvm.smin.i64(i64, i64)

define ptr @worker(ptr %state) {
entry:
  FIELDS
  br label %watch
watch:
  %seen = phi i64 [0, %entry], [%now, %late], [%now, %report.end]
  %limit = load i64, ptr %p.spins
  br label %spin
spin:
  %turn = phi i64 [0, %watch], [%turn.next, %spin.on]
  %g = load atomic i64, ptr %p.generation acquire, align 8
  %new = icmp ne i64 %g, %seen
  br i1 %new, label %lock, label %spin.on
spin.on:
  call void @relax()
  %turn.next = add i64 %turn, 1
  %more = icmp slt i64 %turn.next, %limit
  br i1 %more, label %spin, label %lock
lock:
  %l0 = call i32 @pthread_mutex_lock(ptr %p.mutex)
  br label %check
check:
  %now = load atomic i64, ptr %p.generation monotonic, align 8
  %same = icmp eq i64 %now, %seen
  br i1 %same, label %sleep, label %take
sleep:
  %sl0 = load i64, ptr %p.sleepers
  %sl1 = add i64 %sl0, 1
  store i64 %sl1, ptr %p.sleepers
  %w = call i32 @pthread_cond_wait(ptr %p.work, ptr %p.mutex)
  %sl2 = load i64, ptr %p.sleepers
  %sl3 = sub i64 %sl2, 1
  store i64 %sl3, ptr %p.sleepers
  br label %check
take:
  %open = load i64, ptr %p.slots
  %any = icmp sgt i64 %open, 0
  br i1 %any, label %work, label %late
late:
  %u0 = call i32 @pthread_mutex_unlock(ptr %p.mutex)
  br label %watch
work:
  %left = sub i64 %open, 1
  store i64 %left, ptr %p.slots
  %r0 = load i64, ptr %p.running
  %r1 = add i64 %r0, 1
  store atomic i64 %r1, ptr %p.running monotonic, align 8
  %thread = load i64, ptr %p.next
  %thread.next = add i64 %thread, 1
  store i64 %thread.next, ptr %p.next
  %function = load ptr, ptr %p.function
  %args = load ptr, ptr %p.args
  call void @load_fenv(ptr %p.fenv)
  call void @unlock_and_wake(ptr %state)
  call void %function(ptr %args, i64 %thread)
  %l1 = call i32 @pthread_mutex_lock(ptr %p.mutex)
  %r2 = load i64, ptr %p.running
  %r3 = sub i64 %r2, 1
  store atomic i64 %r3, ptr %p.running release, align 8
  %waiting = load i64, ptr %p.waiting
  %u1 = call i32 @pthread_mutex_unlock(ptr %p.mutex)
  %last = icmp eq i64 %r3, 0
  %awaited = icmp ne i64 %waiting, 0
  %tell = and i1 %last, %awaited
  br i1 %tell, label %report, label %report.end
report:
  %s = call i32 @pthread_cond_signal(ptr %p.done)
  br label %report.end
report.end:
  br label %watch
}

define void @run(ptr %state, ptr %function, ptr %args, i64 %threads) {
entry:
  FIELDS
  %l0 = call i32 @pthread_mutex_lock(ptr %p.mutex)
  store ptr %function, ptr %p.function
  store ptr %args, ptr %p.args
  %slots = sub i64 %threads, 1
  store i64 %slots, ptr %p.slots
  store i64 1, ptr %p.next
  call void @save_fenv(ptr %p.fenv)
  %g0 = load i64, ptr %p.generation
  %g1 = add i64 %g0, 1
  store atomic i64 %g1, ptr %p.generation release, align 8
  call void @unlock_and_wake(ptr %state)
  call void %function(ptr %args, i64 0)
  %l1 = call i32 @pthread_mutex_lock(ptr %p.mutex)
  store i64 0, ptr %p.slots
  %r0 = load i64, ptr %p.running
  %idle = icmp eq i64 %r0, 0
  br i1 %idle, label %leave, label %watch
watch:
  %u0 = call i32 @pthread_mutex_unlock(ptr %p.mutex)
  %limit = load i64, ptr %p.spins
  br label %spin
spin:
  %turn = phi i64 [0, %watch], [%turn.next, %spin.on]
  %r = load atomic i64, ptr %p.running acquire, align 8
  %done = icmp eq i64 %r, 0
  br i1 %done, label %lock, label %spin.on
spin.on:
  call void @relax()
  %turn.next = add i64 %turn, 1
  %more = icmp slt i64 %turn.next, %limit
  br i1 %more, label %spin, label %yield.start
yield.start:
  %yields = load i64, ptr %p.yields
  br label %yield
yield:
  %y = phi i64 [0, %yield.start], [%y.next, %yield.on]
  %r4 = load atomic i64, ptr %p.running acquire, align 8
  %done.now = icmp eq i64 %r4, 0
  %y.next = add i64 %y, 1
  %y.more = icmp slt i64 %y, %yields
  %y.stop = xor i1 %y.more, true
  %y.end = or i1 %done.now, %y.stop
  br i1 %y.end, label %lock, label %yield.on
yield.on:
  %y.r = call i32 @sched_yield()
  br label %yield
lock:
  %l2 = call i32 @pthread_mutex_lock(ptr %p.mutex)
  store i64 1, ptr %p.waiting
  br label %check
check:
  %r1 = load atomic i64, ptr %p.running acquire, align 8
  %zero = icmp eq i64 %r1, 0
  br i1 %zero, label %finished, label %sleep
sleep:
  %w = call i32 @pthread_cond_wait(ptr %p.done, ptr %p.mutex)
  br label %check
finished:
  store i64 0, ptr %p.waiting
  br label %leave
leave:
  %u1 = call i32 @pthread_mutex_unlock(ptr %p.mutex)
  ret void
}

define void @spin(i64 %limit, ptr %watched) {
entry:
  br label %loop
loop:
  %turn = phi i64 [0, %entry], [%turn.next, %loop]
  %r = load atomic i64, ptr %watched acquire, align 8
  call void @relax()
  %turn.next = add i64 %turn, 1
  %more = icmp slt i64 %turn.next, %limit
  br i1 %more, label %loop, label %end
end:
  ret void
}
"""


def pool_ir(arch: Arch) -> str:
    """The module's text for a processor family."""
    fields = (f"%p.{name} = getelementptr i8, ptr %state, i64 {offset}" for name, offset in _FIELDS.items())
    return _PROCESSOR[arch] + _POOL.replace("FIELDS", "\n  ".join(fields))
