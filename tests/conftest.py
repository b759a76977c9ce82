"""Settings of the whole test suite."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hypothesis
import pytest

# Compiled kernels go beside the checkout: a test writes nothing into the home of whoever runs it.
os.environ.setdefault("ANYFLASH_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "anyflash"))

# Kernels compile on first use, so a deadline would mean nothing; a failure prints how to repeat it.
hypothesis.settings.register_profile("anyflash", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("anyflash")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def pytest_report_header(config: pytest.Config) -> str:
    packages = ("numpy", "llvmlite", "ml_dtypes", "torch", "transformers")
    return f"{platform.machine()}, {os.cpu_count()} cores; " + ", ".join(
        f"{name} {_version(name)}" for name in packages
    )
