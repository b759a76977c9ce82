"""The backends, found by listing this folder: adding one is adding a file with a `BACKEND` in it.

A file that cannot be imported stays in the table with the error, so that `explain`, `doctor` and every
refusal show it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache

import anyflash.backends
from anyflash.backends.base import Backend
from anyflash.core.log import logger

_NOT_BACKENDS = frozenset({"base", "registry"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the folder: its backend, or why there is none."""

    name: str
    backend: Backend | None
    error: Exception | None = None

    @property
    def reason(self) -> str | None:
        """Why nothing can run on this backend here; None if something may."""
        if self.backend is None:
            return f"cannot be loaded: {type(self.error).__name__}: {self.error}"
        return self.backend.available()


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """Every backend by name, the preferred first. Imported once for the process."""
    import pkgutil  # here, because only a first call needs it

    found = [
        _load(module.name)
        for module in pkgutil.iter_modules(anyflash.backends.__path__)
        if module.name not in _NOT_BACKENDS
    ]
    return {entry.name: entry for entry in sorted(found, key=_preference)}


def _load(name: str) -> Entry:
    # Anything may go wrong in a backend's own imports, such as a broken driver; it is kept and told.
    try:
        backend: Backend = importlib.import_module(f"{anyflash.backends.__name__}.{name}").BACKEND
        if backend.name != name:
            raise ValueError(f"the backend in {name}.py calls itself {backend.name!r}")
    except Exception as error:  # noqa: BLE001
        logger.warning("backend %s cannot be loaded: %s: %s", name, type(error).__name__, error)
        return Entry(name, None, error)
    return Entry(name, backend)


def _preference(entry: Entry) -> tuple[bool, int, str]:
    rank = entry.backend.rank if entry.backend else None
    return rank is None, rank or 0, entry.name
