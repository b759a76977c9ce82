"""Compiled objects on disk, found by what decides their contents."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from anyflash.core import settings
from anyflash.core.log import logger
from anyflash.kernels.llvm.target import Target

try:
    import fcntl
except (
    ImportError
):  # Windows: no lock, so several processes may compile the same kernel; the rename stays atomic
    fcntl = None

_MAGIC = b"anyflash object 1\n"
_LOCK_TIMEOUT_S = 60.0
_LOCK_POLL_S = 0.002
_UNUSED_DAYS = 30


@dataclass(slots=True)
class Counters:
    """What this process did: objects found on disk, compiled, written; and the last thing that went wrong."""

    hits: int = 0
    compiled: int = 0
    stored: int = 0
    problem: str | None = None


counters = Counters()


def object_key(spec: str, target: Target) -> str:
    """The name of an object: a digest of `spec`, the target, this package's sources and the LLVM version."""
    return hashlib.sha256(f"{spec}\0{target.key}\0{fingerprint()}".encode()).hexdigest()


@functools.cache
def fingerprint() -> str:
    """A digest of everything besides the spec that decides what is emitted, computed once in a process."""
    digest = hashlib.sha256()
    digest.update(" ".join((llvmlite.__version__, *map(str, llvm.llvm_version_info))).encode())
    package = Path(__file__).parents[2]
    for folder in (package / "core", package / "semantics", package / "kernels" / "llvm"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def directory() -> Path:
    """Where this version's objects are. Raises RuntimeError where that is unknown (no home folder)."""
    return settings.cache_dir() / "cpu" / fingerprint()[:16]


def fetch(key: str, compile_object: Callable[[], bytes]) -> bytes:
    """The object called `key`: read, or compiled and stored.

    Of several processes that ask at once, one compiles and the others wait for it. A file that is not whole
    is compiled again and replaced. Where nothing can be stored the object is compiled and used all the same.
    """
    if not settings.cache_enabled():
        return _compile(compile_object)
    try:
        path = directory() / f"{key}.o"
    except RuntimeError as problem:
        _note(f"no place for compiled kernels: {problem} Set ANYFLASH_CACHE_DIR to one.")
        return _compile(compile_object)
    data = _read(path, key)
    if data is not None:
        counters.hits += 1
        _mark_used(path.parent)
        return data
    with _locked(path.parent, key):
        data = _read(path, key)
        if data is not None:
            counters.hits += 1
            return data
        data = _compile(compile_object)
        _write(path, key, data)
        return data


def report() -> dict[str, Any]:
    """For `anyflash doctor`: where the cache is, whether it can be written, its size and use."""
    try:
        here = directory()
    except RuntimeError as problem:
        _note(str(problem))
        here = Path(os.devnull)
    objects = list(here.glob("*.o")) if here.is_dir() else []
    existing = next(folder for folder in (here, *here.parents) if folder.exists())
    return {
        "directory": str(here),
        "enabled": settings.cache_enabled(),
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "objects": len(objects),
        "bytes": sum(path.stat().st_size for path in objects),
        "hits": counters.hits,
        "compiled": counters.compiled,
        "problem": counters.problem,
    }


def _compile(compile_object: Callable[[], bytes]) -> bytes:
    data = compile_object()
    counters.compiled += 1
    return data


def _read(path: Path, key: str) -> bytes | None:
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as problem:
        _note(f"cannot read {path}: {problem}")
        return None
    data = stored[len(_MAGIC) + 32 :]
    if not data or stored[: len(_MAGIC) + 32] != _MAGIC + _checksum(key, data):
        _note(f"{path} is damaged and will be replaced")
        return None
    return data


def _write(path: Path, key: str, data: bytes) -> None:
    temporary = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(_MAGIC + _checksum(key, data) + data)
        temporary.replace(path)
    except OSError as problem:
        _note(f"cannot store compiled kernels in {path.parent}: {problem}")
        _remove(temporary)
    else:
        counters.stored += 1


def _checksum(key: str, data: bytes) -> bytes:
    """Covers the key, so that a file under a wrong name is not taken for another kernel."""
    return hashlib.sha256(key.encode() + data).digest()


@contextmanager
def _locked(folder: Path, key: str) -> Iterator[None]:
    """Hold one of 16 lock files, or go on without where there can be none or its holder hangs."""
    lock = _open_lock(folder, key)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _open_lock(folder: Path, key: str) -> int | None:
    if fcntl is None:
        return None
    path = folder / f"lock-{key[0]}"
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _prune(folder)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as problem:
        _note(f"cannot store compiled kernels in {folder}: {problem}")
        return None
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                _note(f"another process has held {path} for {_LOCK_TIMEOUT_S:.0f} s; compiling beside it")
                return lock
            time.sleep(_LOCK_POLL_S)
        except OSError as problem:
            _note(f"{path} cannot be locked: {problem}")
            return lock
        else:
            return lock


def _prune(folder: Path) -> None:
    """Forget the objects of other versions that nobody has used for a month."""
    oldest = time.time() - _UNUSED_DAYS * 24 * 3600
    for other in folder.parent.iterdir():
        if other != folder and other.is_dir() and other.stat().st_mtime < oldest:
            shutil.rmtree(other, ignore_errors=True)


@functools.cache
def _mark_used(folder: Path) -> None:
    """Once in a process: `_prune` goes by the folder's modification time."""
    try:
        os.utime(folder)
    except OSError as problem:
        logger.debug("cannot mark %s as used: %s", folder, problem)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as problem:
        logger.debug("cannot remove %s: %s", path, problem)


def _note(problem: str) -> None:
    if problem != counters.problem:
        logger.info("kernel cache: %s", problem)
    counters.problem = problem
