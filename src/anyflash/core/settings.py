"""The environment variables that anyflash reads. Nothing else in the library reads the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path


def _cache_dir() -> Path:
    from pathlib import Path  # here, because `import anyflash` needs no path

    given = os.environ.get("ANYFLASH_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "anyflash"


def _num_threads() -> int | None:
    text = os.environ.get("ANYFLASH_NUM_THREADS")
    if not text:
        return None
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"ANYFLASH_NUM_THREADS={text!r}: expected a whole number of at least 1")
    return count


def _float32() -> Literal["ieee", "tf32"] | None:
    text = os.environ.get("ANYFLASH_FLOAT32") or None
    if text in (None, "ieee", "tf32"):
        return text
    raise ValueError(f"ANYFLASH_FLOAT32={text!r}: expected ieee or tf32")


SETTINGS: dict[str, tuple[str, Callable[[], object]]] = {
    "ANYFLASH_CPU": (
        "restrict the CPU kernels to one of avx2, avx512, avx512bf16, amx, amx-emulated, neon, generic",
        lambda: os.environ.get("ANYFLASH_CPU") or None,
    ),
    "ANYFLASH_NUM_THREADS": (
        "threads of the CPU kernels; without it the framework's setting or the usable cores",
        _num_threads,
    ),
    "ANYFLASH_FLOAT32": (
        "how GPUs multiply float32: ieee, or tf32; without it the framework's setting for matrix products",
        _float32,
    ),
    "ANYFLASH_CACHE_DIR": ("where compiled kernels are kept", _cache_dir),
    "ANYFLASH_CACHE": (
        "0 turns the on-disk kernel cache off",
        lambda: os.environ.get("ANYFLASH_CACHE", "1") != "0",
    ),
    "ANYFLASH_LOG": (
        "0 silent (default), 1 plans, 2 every call with its inputs, before it runs",
        lambda: int(os.environ.get("ANYFLASH_LOG", "0")),
    ),
}


def cpu_features() -> str | None:
    return os.environ.get("ANYFLASH_CPU") or None


def num_threads() -> int | None:
    return _num_threads()


def float32_products() -> Literal["ieee", "tf32"] | None:
    return _float32()


def cache_dir() -> Path:
    return _cache_dir()


def cache_enabled() -> bool:
    return os.environ.get("ANYFLASH_CACHE", "1") != "0"


def log_level() -> int:
    return int(os.environ.get("ANYFLASH_LOG", "0"))
