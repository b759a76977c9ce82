"""Checkouts of systems that exist only as source, importable for as long as a row's process."""

from __future__ import annotations

import atexit
from contextlib import AbstractContextManager, ExitStack

_open = ExitStack()
atexit.register(_open.close)


def keep(importable: AbstractContextManager[object]) -> None:
    """Enter an adapter's `importable()` for the rest of the process, which measures one row alone."""
    _open.enter_context(importable)
