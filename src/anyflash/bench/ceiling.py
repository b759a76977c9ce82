"""What this machine can do at most: matrix products by torch, and reading memory.

The product of a narrow dtype is that dtype's own or float32's, whichever is faster: whoever computes with
narrow numbers may widen them first. Matrices are as large as a turn allows. Memory is read by a loop of our
own kernels' compiler, over more than the caches hold; it does nothing else.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from anyflash.bench.timing import Call
from anyflash.core.threads import num_threads

_SIZES = (2048, 1024, 512)
_TRIALS, _TRIAL_SIZE = 5, 256
_SLOWEST_CALL = 0.25
_DEFAULT_CACHE = 32 << 20
_LEAST_READ = 128 << 20
CHUNK = 1 << 20
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Ceiling:
    """`amount` operations or bytes a call."""

    name: str
    amount: float
    call: Call


def products(dtype: str) -> Ceiling:
    """torch's matrix product for operands of `dtype`, with as many threads as torch is set to."""
    return _products(dtype, torch.get_num_threads())


@functools.cache
def _products(dtype: str, threads: int) -> Ceiling:
    kinds = sorted({dtype, "float32"} if torch.finfo(getattr(torch, dtype)).bits < 32 else {dtype})
    speeds = {kind: _speed(kind, _TRIAL_SIZE) for kind in kinds}
    kind = max(speeds, key=speeds.__getitem__)
    n = next((n for n in _SIZES if 2 * n**3 / speeds[kind] <= _SLOWEST_CALL), _SIZES[-1])
    return Ceiling(f"GEMM {kind} {n}", 2.0 * n**3, _product(kind, n))


def _product(kind: str, n: int) -> Call:
    a, b = (torch.randn(n, n).to(getattr(torch, kind)) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _speed(kind: str, n: int) -> float:
    """Operations a second, the best of some calls."""
    call = _product(kind, n)
    best = float("inf")
    for _ in range(_TRIALS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


@functools.cache
def memory() -> Ceiling:
    """Reading several times what the last-level cache holds, with as many threads as our kernels use."""
    nbytes = -(-max(4 * last_level_cache(), _LEAST_READ) // CHUNK) * CHUNK
    buffer = np.ones(nbytes + CHUNK, np.uint8)
    first = -buffer.ctypes.data % ALIGNMENT
    return Ceiling("memory read", float(nbytes), reader(buffer[first : first + nbytes])[0])


def reader(array: NDArray[np.uint8]) -> tuple[Call, NDArray[np.int64]]:
    """A call that reads all of `array` (whole chunks, aligned), and where it leaves (1,) of what it read: the
    xor of every first word of a vector, in the chunks of the thread that ended last."""
    from anyflash.kernels.llvm import engine, pool
    from anyflash.kernels.llvm.target import host_target

    target = host_target()
    kernel = engine.compile_module(_read_ir(target.vector_bytes), target, None, ("read",))
    args = np.zeros(6, np.int64)
    args[1:5] = array.nbytes // CHUNK, CHUNK, array.ctypes.data, args[5:].ctypes.data

    def read() -> NDArray[np.uint8]:
        args[0] = 0
        pool.run(kernel.addresses["read"], args.ctypes.data, num_threads())
        return array

    return read, args[5:]


def last_level_cache() -> int:
    """Bytes of the largest cache that the system tells of."""
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max(
        (int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=_DEFAULT_CACHE
    )


def _read_ir(vector_bytes: int) -> str:
    """`read(args, thread)`: xor of everything in the chunks it takes. args: next chunk, chunks, bytes of a
    chunk (a multiple of eight vectors), first address, where a sum is left so that the loads are not
    removed."""
    lanes, count = vector_bytes // 8, 8
    vector = f"<{lanes} x i64>"
    phis = "\n".join(
        f"  %acc{i} = phi {vector} [zeroinitializer, %take], [%new{i}, %loop]" for i in range(count)
    )
    loads = "\n".join(
        f"  %p{i} = getelementptr i8, ptr %p, i64 {i * vector_bytes}\n"
        f"  %v{i} = load {vector}, ptr %p{i}, align {vector_bytes}\n"
        f"  %new{i} = xor {vector} %acc{i}, %v{i}"
        for i in range(count)
    )
    sums = "\n".join(
        f"  %sum{i} = xor {vector} %new{i}, {'%new0' if i == 1 else f'%sum{i - 1}'}" for i in range(1, count)
    )
    fields = "\n".join(
        f"  %at{i} = getelementptr i64, ptr %args, i64 {i}\n  %arg{i} = load i64, ptr %at{i}"
        for i in range(1, 5)
    )
    return f"""
define void @read(ptr %args, i64 %thread) {{
entry:
{fields}
  %first = inttoptr i64 %arg3 to ptr
  %sink = inttoptr i64 %arg4 to ptr
  br label %hand.out
hand.out:
  %chunk = atomicrmw add ptr %args, i64 1 monotonic
  %any = icmp slt i64 %chunk, %arg1
  br i1 %any, label %take, label %end
take:
  %offset = mul i64 %chunk, %arg2
  %begin = getelementptr i8, ptr %first, i64 %offset
  %stop = getelementptr i8, ptr %begin, i64 %arg2
  br label %loop
loop:
  %p = phi ptr [%begin, %take], [%next, %loop]
{phis}
{loads}
  %next = getelementptr i8, ptr %p, i64 {count * vector_bytes}
  %more = icmp ult ptr %next, %stop
  br i1 %more, label %loop, label %done
done:
{sums}
  %one = extractelement {vector} %sum{count - 1}, i64 0
  store atomic i64 %one, ptr %sink monotonic, align 8
  br label %hand.out
end:
  ret void
}}
"""
