"""The machine and the software under which figures were taken."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

import anyflash
from anyflash.bench.ceiling import last_level_cache
from anyflash.bench.peers import registry
from anyflash.core.threads import usable_cores

_PACKAGES = ("numpy", "llvmlite", "torch")


def describe() -> dict[str, Any]:
    """Processor, caches, memory, system, versions, and the time in UTC."""
    from anyflash.kernels.llvm.target import host_target

    versions = {"python": platform.python_version(), "anyflash": anyflash.__version__}
    for package in dict.fromkeys([*_PACKAGES, *(peer.package for peer in registry.peers())]):
        versions[package] = registry.version(package)
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "instruction_set": host_target().name,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
