from __future__ import annotations

from collections.abc import Iterator

import pytest

from anyflash.kernels.llvm import scratch


@pytest.fixture(scope="session", autouse=True)
def _poisoned_scratch() -> Iterator[None]:
    """Working memory holds NaN before each call, and writing behind it is an error."""
    scratch.poison(True)
    yield
    scratch.poison(False)
