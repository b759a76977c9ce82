"""The instruction sets the CPU kernels are emitted for, and which of them this machine runs.

A target fixes an instruction set and not one processor: two machines with the same target share compiled
objects. What the machine offers is read from the feature list that LLVM detects, never from a processor's
name, which virtual machines misreport.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import llvmlite.binding as llvm

from anyflash.core import settings
from anyflash.core.errors import InvalidCall

Arch = Literal["x86", "arm", "other"]


@dataclass(frozen=True, slots=True)
class Target:
    """One instruction set, as the emitter and LLVM see it. Hashable and printable: it is part of cache keys.

    triple, cpu, features   what LLVM is given
    vector_bytes            width of the vector registers that kernels use
    num_registers           how many of them there are
    fma                     `llvm.fma` on vectors is an instruction (elsewhere it is a call into libm)
    f16c                    float16 <-> float32 conversions are instructions
    bf16_dot                AVX512-BF16: pair products of bfloat16 into float32, and float32 -> bfloat16
    amx                     tile registers and `tdpbf16ps`
    amx_emulated            kernels are scheduled for tiles, but every tile operation is emitted as plain IR
    """

    name: str
    triple: str
    cpu: str
    features: str
    vector_bytes: int
    num_registers: int
    fma: bool = False
    f16c: bool = False
    bf16_dot: bool = False
    amx: bool = False
    amx_emulated: bool = False

    @property
    def tiles(self) -> bool:
        """Kernels are scheduled for AMX tiles, real or emulated."""
        return self.amx or self.amx_emulated

    @property
    def arch(self) -> Arch:
        return _arch(self.triple)

    @property
    def key(self) -> str:
        """Everything that decides which code is emitted, as text."""
        return f"{self.name}/{self.triple}/{self.cpu}/{self.features}"


@dataclass(frozen=True, slots=True)
class _InstructionSet:
    """A row of the table below: LLVM's baseline plus features, and what it needs of a machine."""

    arch: Arch
    cpu: str
    features: str
    needs: tuple[str, ...]
    vector_bytes: int
    num_registers: int
    fma: bool = False
    f16c: bool = False
    bf16_dot: bool = False
    amx: bool = False


_AVX2 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe", "popcnt")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_BF16 = (*_AVX512, "avx512bf16")
_AMX = (*_BF16, "amx-tile", "amx-bf16")

# Best first. x86-64-v4 prefers 256-bit vectors, a choice made for early AVX-512 machines: it is switched off.
_SETS: Mapping[str, _InstructionSet] = {
    "amx": _InstructionSet(
        "x86",
        "x86-64-v4",
        "-prefer-256-bit,+avx512bf16,+amx-tile,+amx-bf16",
        _AMX,
        64,
        32,
        True,
        True,
        True,
        True,
    ),
    "avx512bf16": _InstructionSet(
        "x86", "x86-64-v4", "-prefer-256-bit,+avx512bf16", _BF16, 64, 32, True, True, True
    ),
    "avx512": _InstructionSet("x86", "x86-64-v4", "-prefer-256-bit", _AVX512, 64, 32, True, True),
    "avx2": _InstructionSet("x86", "x86-64-v3", "", _AVX2, 32, 16, True, True),
    "neon": _InstructionSet("arm", "generic", "+fp-armv8,+neon", (), 16, 32, True, True),
}
_CROSS_TRIPLE: Mapping[Arch, str] = {"x86": "x86_64-unknown-linux-gnu", "arm": "aarch64-unknown-linux-gnu"}
_GENERIC_CPU: Mapping[Arch, str] = {"x86": "x86-64", "arm": "generic", "other": ""}
NAMES = (*_SETS, "amx-emulated", "generic")


def get_target(name: str) -> Target:
    """The target called `name`, whether or not this machine can run it (to emit code for another machine).

    Raises InvalidCall if there is none of that name.
    """
    if name == "amx-emulated":
        base = get_target(_best_without_amx())
        return _with_emulated_tiles(base)
    if name == "generic":
        return Target(name, _host_triple(), _GENERIC_CPU[_arch(_host_triple())], "", 16, 16)
    row = _SETS.get(name)
    if row is None:
        raise InvalidCall("target", repr(name), "one of " + ", ".join(NAMES))
    triple = _host_triple() if _arch(_host_triple()) == row.arch else _CROSS_TRIPLE[row.arch]
    return Target(
        name, triple, row.cpu, row.features, row.vector_bytes, row.num_registers,
        row.fma, row.f16c, row.bf16_dot, row.amx,
    )  # fmt: skip


def host_target() -> Target:
    """The best target of this machine, or the one that ANYFLASH_CPU names.

    Raises InvalidCall, naming what this machine offers, if ANYFLASH_CPU is unknown or asks for what it lacks.
    """
    return _host_target(settings.cpu_features())


@functools.cache
def _host_target(asked: str | None) -> Target:
    if asked is None:
        return get_target(next(name for name in (*_SETS, "generic") if why_not(name) is None))
    offered = "one of " + ", ".join(name for name in NAMES if why_not(name) is None)
    if asked not in NAMES:
        raise InvalidCall("ANYFLASH_CPU", f"unknown feature set {asked!r}", offered)
    reason = why_not(asked)
    if reason is not None:
        raise InvalidCall("ANYFLASH_CPU", f"{asked!r} cannot run here: {reason}", offered)
    return get_target(asked)


@functools.cache
def why_not(name: str) -> str | None:
    """None if this machine runs the target `name`, else the reason."""
    row = _SETS.get(name)
    if row is None:
        return None if name in NAMES else "no such target"
    if row.arch != _arch(_host_triple()):
        return f"this is not an {row.arch} processor (code can be emitted for it, not run)"
    have = host_features()
    missing = [feature for feature in row.needs if not have.get(feature, False)]
    if missing:
        return "the processor lacks " + ", ".join(missing)
    return _request_amx() if row.amx else None


@functools.cache
def host_features() -> Mapping[str, bool]:
    """LLVM's feature names of this processor, as the operating system lets them be used."""
    return dict(llvm.get_host_cpu_features())


def target_report() -> dict[str, Any]:
    """For `anyflash doctor`: the processor's name, the chosen target or why there is none, and each target's
    state.

    Keys: `cpu` (LLVM's name of the processor, informative only), `asked` (ANYFLASH_CPU or None), `chosen` (a
    target's name, or None), `error` (why nothing could be chosen, or None), `targets` (name -> None or the
    reason why it cannot run here).
    """
    chosen, error = None, None
    try:
        chosen = host_target().name
    except InvalidCall as problem:
        error = str(problem)
    return {
        "cpu": llvm.get_host_cpu_name(),
        "asked": settings.cpu_features(),
        "chosen": chosen,
        "error": error,
        "targets": {name: why_not(name) for name in NAMES},
    }


def _best_without_amx() -> str:
    names = (name for name, row in _SETS.items() if not row.amx)
    return next((name for name in names if why_not(name) is None), "generic")


def _with_emulated_tiles(base: Target) -> Target:
    return Target(
        "amx-emulated", base.triple, base.cpu, base.features, base.vector_bytes, base.num_registers,
        base.fma, base.f16c, base.bf16_dot, amx=False, amx_emulated=True,
    )  # fmt: skip


@functools.cache
def _host_triple() -> str:
    return llvm.get_process_triple()


def _arch(triple: str) -> Arch:
    machine = triple.split("-", 1)[0]
    if machine in ("x86_64", "amd64"):
        return "x86"
    return "arm" if machine.startswith(("aarch64", "arm64")) else "other"


_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


def _request_amx() -> str | None:
    """Ask Linux for the tile registers, which it grants to a process once and for all threads."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "tile registers are requested by a Linux system call"
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_long(n) for n in (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA))
    if libc.syscall(*arguments) != 0:
        return f"Linux refuses the tile registers (errno {ctypes.get_errno()})"
    return None
