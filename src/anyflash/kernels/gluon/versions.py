"""Which versions of Triton these kernels are written for. Imports no Triton."""

from __future__ import annotations

OLDEST, NEWEST = (3, 6), (3, 9)


def unsupported(version: str) -> str | None:
    """Why a version of Triton cannot be used, or None."""
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if OLDEST <= found <= NEWEST:
        return None
    low, high = (f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
    return f"needs triton {low} to {high}, whose Gluon it knows; installed is {version}"
