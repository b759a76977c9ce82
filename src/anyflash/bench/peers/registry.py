"""All peers, found by listing this folder: adding one is adding a file with `PEERS` in it."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from functools import lru_cache

import anyflash.bench.peers
from anyflash.bench.peers.base import Peer

_NOT_PEERS = frozenset({"base", "registry"})


@lru_cache(maxsize=1)
def peers() -> tuple[Peer, ...]:
    """Every way of every file, in the files' order."""
    folder = anyflash.bench.peers
    files = sorted(f.name for f in pkgutil.iter_modules(folder.__path__) if f.name not in _NOT_PEERS)
    return tuple(
        peer for name in files for peer in importlib.import_module(f"{folder.__name__}.{name}").PEERS
    )


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
