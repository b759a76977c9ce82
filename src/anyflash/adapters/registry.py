"""All adapters, found by listing this folder: adding one is adding one file."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import cast

from anyflash.adapters.base import Adapter

NOT_ADAPTERS = {"base", "checkout", "registry"}


def names() -> list[str]:
    """The adapters' module names, sorted."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(m.name for m in found if not m.ispkg and m.name not in NOT_ADAPTERS)


def get(name: str) -> Adapter:
    """The adapter called `name`. Raises KeyError, listing those that exist."""
    if name not in names():
        raise KeyError(f"no adapter called {name!r}; there are: {', '.join(names())}")
    return cast(Adapter, importlib.import_module(f"anyflash.adapters.{name}"))


def adapters() -> list[Adapter]:
    return [get(name) for name in names()]
