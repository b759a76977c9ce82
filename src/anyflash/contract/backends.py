"""Which backends the contract runs on."""

from __future__ import annotations

from anyflash.backends.registry import entries


def present() -> list[str]:
    """Names of the backends that work on this machine, the preferred first."""
    return [name for name, entry in entries().items() if entry.reason is None]
