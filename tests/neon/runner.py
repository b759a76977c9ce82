"""Runs kernels compiled for AArch64 under qemu-user, without a C compiler or a C library for that machine.

The kernel's object is linked with a few functions emitted here: `_start`, which reads one request from
standard input, calls the kernel and writes the memory back to standard output; and memcpy, memmove and
memset, which LLVM may call. The processor that is emulated has ARMv8.0 and nothing more, so an instruction
beyond it is an error.

    out, = run(ir, "scale", [b"..."], [Pointer(0), 4])
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anyflash.kernels.llvm import elf, engine
from anyflash.kernels.llvm.target import get_target

LINKERS = ("aarch64-linux-gnu-ld", "ld.lld")
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
PACKAGES = "qemu-user binutils-aarch64-linux-gnu"
_PROCESSOR = "cortex-a72"
_TIMEOUT_S = 300
_ALIGNMENT = 64
_HEADER = struct.Struct(
    "<4q"
)  # bytes of memory, offset of the argument block, number of relocations, threads


class MissingTools(RuntimeError):
    """The emulator or the linker is not installed."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """The address of byte `offset` of buffer number `buffer`."""

    buffer: int
    offset: int = 0


def missing() -> str | None:
    """None if kernels can be run, else what has to be installed."""
    absent = [] if _linker() else ["a linker for AArch64"]
    if not (_native() or _emulator()):
        absent.append("qemu-aarch64")
    if not absent:
        return None
    return f"{' and '.join(absent)} not found: install the Debian packages {PACKAGES}"


def run(
    ir: str,
    symbol: str,
    buffers: Sequence[bytes],
    args: Sequence[int | Pointer],
    *,
    threads: int = 1,
    patches: Mapping[Pointer, Pointer] | None = None,
) -> list[bytes]:
    """Compile `ir` for NEON, call `void symbol(ptr args, i64 thread)`, and return the buffers as they are
    after.

    Args:
        ir: text of the module that defines `symbol`.
        symbol: the worker to call.
        buffers: contents of the memory it may use; each begins at a multiple of 64.
        args: the block of 64-bit words it gets, integers or addresses in buffers.
        threads: it is called once for each thread number below this, one call after the other.
        patches: words inside buffers that shall hold addresses (place -> address).

    Raises:
        MissingTools: no linker or no emulator; the message names the packages.
        RuntimeError: the kernel calls something that is not there, or crashes.
    """
    program = _program(ir, symbol)
    starts, relocations, memory = _lay_out(buffers, args, patches or {})
    header = _HEADER.pack(len(memory), starts[len(buffers)], len(relocations) // 8, threads)
    command = [str(program)] if _native() else [str(_emulator()), "-cpu", _PROCESSOR, str(program)]
    done = subprocess.run(
        command, input=header + relocations + memory, capture_output=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode or len(done.stdout) != len(memory):
        said = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{symbol} ended with status {done.returncode} under {command[0]}: {said}")
    return [done.stdout[at : at + len(buffer)] for at, buffer in zip(starts, buffers, strict=False)]


def _lay_out(
    buffers: Sequence[bytes], args: Sequence[int | Pointer], patches: Mapping[Pointer, Pointer]
) -> tuple[list[int], bytes, bytes]:
    """Where each buffer and then the block start, the packed offsets of all address words, the memory."""
    block = b"".join(struct.pack("<q", 0 if isinstance(word, Pointer) else word) for word in args)
    starts: list[int] = []
    memory = bytearray()
    for content in (*buffers, block):
        memory += bytes(-len(memory) % _ALIGNMENT)
        starts.append(len(memory))
        memory += content
    places = {starts[at.buffer] + at.offset: to for at, to in patches.items()}
    places |= {starts[-1] + 8 * i: word for i, word in enumerate(args) if isinstance(word, Pointer)}
    for place, to in places.items():
        struct.pack_into("<q", memory, place, starts[to.buffer] + to.offset)
    return starts, struct.pack(f"<{len(places)}q", *places), bytes(memory)


def _program(ir: str, symbol: str) -> Path:
    reason = missing()
    if reason:
        raise MissingTools(reason)
    name = hashlib.sha256(f"{symbol}\0{ir}".encode()).hexdigest()[:24]
    program = _folder() / name
    if not program.exists():
        target = get_target("neon")
        kernel = engine.emit_object(ir, target)
        unknown = elf.undefined_symbols(kernel) - {"memcpy", "memmove", "memset"}
        if unknown:
            raise RuntimeError(f"the kernel calls {', '.join(sorted(unknown))}, which is not there")
        objects = []
        for part, data in (
            ("kernel", kernel),
            ("start", engine.emit_object(_START % {"symbol": symbol, "system": _SYSTEM}, target)),
        ):
            objects.append(_folder() / f"{name}.{part}.o")
            objects[-1].write_bytes(data)
        subprocess.run(
            [str(_linker()), "-o", f"{program}.new", *map(str, objects)], check=True, capture_output=True
        )
        Path(f"{program}.new").replace(program)
    return program


@functools.cache
def _folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="anyflash-neon-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def _linker() -> str | None:
    return next(filter(None, map(shutil.which, LINKERS)), None)


@functools.cache
def _emulator() -> str | None:
    return next(filter(None, map(shutil.which, EMULATORS)), None)


def _native() -> bool:
    return platform.machine() == "aarch64" and platform.system() == "Linux"


_MOVES = ((8, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6))
_SYSTEM = ", ".join(
    f"i32 {word}" for word in (*(0xAA0003E0 | m << 16 | d for d, m in _MOVES), 0xD4000001, 0xD65F03C0)
)
_START = """
; number to x8, the rest down by one register, svc #0, ret. As words, because llvmlite has assemblers for the
; host only.
@system.code = internal constant [9 x i32] [%(system)s], section ".text.system", align 4

define internal i64 @system(i64 %%number, i64 %%a, i64 %%b, i64 %%c, i64 %%d, i64 %%e, i64 %%f) #0 {
  %%r = call i64 @system.code(i64 %%number, i64 %%a, i64 %%b, i64 %%c, i64 %%d, i64 %%e, i64 %%f)
  ret i64 %%r
}

; Read (63) or write (64) all of `size` bytes; anything else ends the process.
define internal void @transfer(i64 %%call, i64 %%file, i64 %%at, i64 %%size) #0 {
entry:
  br label %%loop
loop:
  %%done = phi i64 [0, %%entry], [%%more, %%step]
  %%left = sub i64 %%size, %%done
  %%any = icmp sgt i64 %%left, 0
  br i1 %%any, label %%move, label %%end
move:
  %%to = add i64 %%at, %%done
  %%n = call i64 @system(i64 %%call, i64 %%file, i64 %%to, i64 %%left, i64 0, i64 0, i64 0)
  %%good = icmp sgt i64 %%n, 0
  br i1 %%good, label %%step, label %%fail
step:
  %%more = add i64 %%done, %%n
  br label %%loop
fail:
  call void @exit(i64 3)
  unreachable
end:
  ret void
}

define internal void @exit(i64 %%status) #0 {
  %%r = call i64 @system(i64 93, i64 %%status, i64 0, i64 0, i64 0, i64 0, i64 0)
  unreachable
}

define internal i64 @map(i64 %%size) #0 {
  %%room = add i64 %%size, 65536
  %%r = call i64 @system(i64 222, i64 0, i64 %%room, i64 3, i64 34, i64 -1, i64 0)
  ret i64 %%r
}

declare void @%(symbol)s(ptr, i64)

define void @_start() #0 {
entry:
  %%header = alloca [4 x i64], align 16
  %%h = ptrtoint ptr %%header to i64
  call void @transfer(i64 63, i64 0, i64 %%h, i64 32)
  %%p.args = getelementptr i64, ptr %%header, i64 1
  %%p.count = getelementptr i64, ptr %%header, i64 2
  %%p.threads = getelementptr i64, ptr %%header, i64 3
  %%size = load i64, ptr %%header
  %%args = load i64, ptr %%p.args
  %%count = load i64, ptr %%p.count
  %%threads = load i64, ptr %%p.threads
  %%table.size = mul i64 %%count, 8
  %%table.at = call i64 @map(i64 %%table.size)
  call void @transfer(i64 63, i64 0, i64 %%table.at, i64 %%table.size)
  %%base = call i64 @map(i64 %%size)
  call void @transfer(i64 63, i64 0, i64 %%base, i64 %%size)
  %%memory = inttoptr i64 %%base to ptr
  %%table = inttoptr i64 %%table.at to ptr
  br label %%relocate
relocate:
  %%i = phi i64 [0, %%entry], [%%i.next, %%word]
  %%more = icmp slt i64 %%i, %%count
  br i1 %%more, label %%word, label %%call
word:
  %%entry.at = getelementptr i64, ptr %%table, i64 %%i
  %%offset = load i64, ptr %%entry.at
  %%place = getelementptr i8, ptr %%memory, i64 %%offset
  %%old = load i64, ptr %%place, align 1
  %%new = add i64 %%old, %%base
  store i64 %%new, ptr %%place, align 1
  %%i.next = add i64 %%i, 1
  br label %%relocate
call:
  %%t = phi i64 [0, %%relocate], [%%t.next, %%once]
  %%again = icmp slt i64 %%t, %%threads
  br i1 %%again, label %%once, label %%answer
once:
  %%block = getelementptr i8, ptr %%memory, i64 %%args
  call void @%(symbol)s(ptr %%block, i64 %%t)
  %%t.next = add i64 %%t, 1
  br label %%call
answer:
  call void @transfer(i64 64, i64 1, i64 %%base, i64 %%size)
  call void @exit(i64 0)
  unreachable
}

define ptr @memset(ptr %%to, i32 %%value, i64 %%size) #0 {
entry:
  %%byte = trunc i32 %%value to i8
  br label %%loop
loop:
  %%i = phi i64 [0, %%entry], [%%i.next, %%move]
  %%more = icmp ult i64 %%i, %%size
  br i1 %%more, label %%move, label %%end
move:
  %%at = getelementptr i8, ptr %%to, i64 %%i
  store i8 %%byte, ptr %%at
  %%i.next = add i64 %%i, 1
  br label %%loop
end:
  ret ptr %%to
}

define ptr @memcpy(ptr %%to, ptr %%from, i64 %%size) #0 {
  %%r = call ptr @memmove(ptr %%to, ptr %%from, i64 %%size)
  ret ptr %%r
}

; Upwards if the destination lies below the source, else downwards.
define ptr @memmove(ptr %%to, ptr %%from, i64 %%size) #0 {
entry:
  %%up = icmp ult ptr %%to, %%from
  br label %%loop
loop:
  %%i = phi i64 [0, %%entry], [%%i.next, %%move]
  %%more = icmp ult i64 %%i, %%size
  br i1 %%more, label %%move, label %%end
move:
  %%i.next = add i64 %%i, 1
  %%mirror = sub i64 %%size, %%i.next
  %%k = select i1 %%up, i64 %%i, i64 %%mirror
  %%src = getelementptr i8, ptr %%from, i64 %%k
  %%dst = getelementptr i8, ptr %%to, i64 %%k
  %%byte = load i8, ptr %%src
  store i8 %%byte, ptr %%dst
  br label %%loop
end:
  ret ptr %%to
}

attributes #0 = { nounwind noinline "no-builtins" }
"""
