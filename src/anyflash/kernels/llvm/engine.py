"""From LLVM IR to machine code in this process, and to objects and assembly for any target.

All code takes one road: text -> optimised module -> object file (kept by `cache`) -> linked into one LLJIT,
so that what a warm start runs is byte for byte what a cold start ran. Kernels arrive as the vector code they
shall be, so only variables in memory become values and the simplest clean-up is done: LLVM's full pipeline
was measured to double the time of compiling and to make nothing faster. The engine and everything linked into
it live until the process ends, because addresses are handed out as plain integers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from anyflash.core import settings
from anyflash.core.errors import BackendBroken
from anyflash.core.log import logger
from anyflash.kernels.llvm import cache, elf
from anyflash.kernels.llvm.target import Target, host_target

# What generated code may call. Anything else (a libm function behind an intrinsic, say) would be slow and is
# refused.
_RUNTIME = ("memcpy", "memset", "memmove")

# LLVM is not safe to enter from two threads at once here. Held across fork, so that a child never inherits it
# locked and no child keeps a cache lock of its parent's open.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@dataclass(frozen=True, slots=True)
class Kernel:
    """Compiled functions of one module. Valid until the process ends; safe to call from any thread."""

    addresses: Mapping[str, int]
    key: str

    def function(self, symbol: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
        """`symbol` as a ctypes function that releases the GIL; `arguments` and `result` are ctypes types."""
        return ctypes.CFUNCTYPE(result, *arguments)(self.addresses[symbol])

    def integer(self, symbol: str) -> int:
        """The value of `symbol`, a constant of type i64: how a module carries facts about itself."""
        return ctypes.c_int64.from_address(self.addresses[symbol]).value


_kernels: dict[str, Kernel] = {}
_library_number = itertools.count()


def compile_module(
    ir: str | Callable[[], str],
    target: Target,
    key: str | None,
    symbols: Sequence[str],
    imports: Mapping[str, int] | None = None,
) -> Kernel:
    """Machine code for `symbols` of a module, from this process, from the cache on disk, or compiled now.

    Args:
        ir: the module's text, or a function that makes it, called only if it has to be compiled.
        target: an instruction set that this machine runs.
        key: a text that decides the module (together with the sources of this package, the LLVM version and
            the target, which are added here); None to use the module's text itself.
        symbols: the functions and constants whose addresses are wanted.
        imports: addresses of further external functions that the module declares.

    Raises:
        BackendBroken: LLVM refuses the module; the message says where its text was saved.
    """
    if key is None:
        ir = ir if isinstance(ir, str) else ir()
        key = hashlib.sha256(ir.encode()).hexdigest()
    digest = cache.object_key(key, target)
    kernel = _kernels.get(digest)
    if kernel is None:
        with _lock:
            kernel = _kernels.get(digest)
            if kernel is None:
                imports = imports or {}
                data = cache.fetch(digest, lambda: _self_contained(ir, target, frozenset(imports)))
                kernel = _kernels[digest] = _link(data, digest, tuple(symbols), imports)
    return kernel


def emit_object(ir: str, target: Target) -> bytes:
    """The relocatable object of a module, for any target, of this machine or not."""
    return _codegen(ir, target, assembly=False)


def emit_assembly(ir: str, target: Target) -> str:
    """The optimised assembly of a module, for any target, of this machine or not."""
    return _codegen(ir, target, assembly=True)


def _self_contained(ir: str | Callable[[], str], target: Target, imports: frozenset[str]) -> bytes:
    text = ir if isinstance(ir, str) else ir()
    data = emit_object(text, target)
    unknown = elf.undefined_symbols(data) - set(_RUNTIME) - imports
    if unknown:
        calls = f"the code calls {', '.join(sorted(unknown))}, which is no instruction of this target"
        raise _broken(f"compiling for {target.name}", calls, text)
    return data


def _codegen(ir: str, target: Target, *, assembly: bool) -> Any:
    with _lock:
        try:
            module = llvm.parse_assembly(ir)
            machine = _machine(target)
            module.triple = target.triple
            module.data_layout = str(machine.target_data)
            module.verify()
            _optimise(module, machine)
            return machine.emit_assembly(module) if assembly else machine.emit_object(module)
        except RuntimeError as cause:
            raise _broken(f"compiling for {target.name}", cause, ir) from cause


def _optimise(module: Any, machine: Any) -> None:
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)


@functools.cache
def _machine(target: Target) -> Any:
    _initialise()
    # Position independent and small: constants are read relative to the instruction pointer, wherever it is
    # loaded.
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="small"
    )


@functools.cache
def _initialise() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    # Inline assembly is parsed by the target's assembler.
    llvm.initialize_native_asmparser()


@functools.cache
def _jit() -> Any:
    jit = llvm.create_lljit_compiler(_machine(host_target()), use_jit_link=True, suppress_errors=True)
    # Never disposed of: threads may be inside its code while the interpreter shuts down.
    jit._owned = True
    return jit


def _link(data: bytes, digest: str, symbols: Sequence[str], imports: Mapping[str, int]) -> Kernel:
    builder = llvm.JITLibraryBuilder().add_object_img(data)
    for name, address in {**_runtime_addresses(), **imports}.items():
        builder.import_symbol(name, address)
    for symbol in symbols:
        builder.export_symbol(symbol)
    try:
        # A library's name can be used once, and a failed link uses it up.
        library = builder.link(_jit(), f"{digest}.{next(_library_number)}")
    except RuntimeError as cause:
        raise BackendBroken("cpu", f"linking {', '.join(symbols)}", cause) from cause
    addresses = {symbol: library[symbol] for symbol in symbols}
    library.detach()
    return Kernel(addresses, digest)


def process_address(name: str) -> int:
    """Where a C function of this process lies."""
    function = getattr(ctypes.CDLL(None), name)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


@functools.cache
def _runtime_addresses() -> dict[str, int]:
    return {name: process_address(name) for name in _RUNTIME}


def _broken(doing: str, cause: BaseException | str, ir: str) -> BackendBroken:
    path = _save(ir)
    logger.info("the module that failed is in %s", path)
    return BackendBroken("cpu", doing, f"{cause} (its LLVM IR is in {path})")


def _save(ir: str) -> Path:
    name = f"broken-{hashlib.sha256(ir.encode()).hexdigest()[:16]}.ll"
    for folder in (settings.cache_dir, lambda: Path(tempfile.mkdtemp(prefix="anyflash-"))):
        try:
            path = folder() / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(ir)
        except (OSError, RuntimeError) as problem:
            logger.info("cannot save a module that failed to compile: %s", problem)
        else:
            return path
    return Path(os.devnull)
