"""Layers split over a process group, which anyflash does not have: named, so that imports work."""

from __future__ import annotations

from typing import Any

from torch import nn

from anyflash.compat.errors import unsupported


def absent(name: str, instead: str) -> type[nn.Module]:
    """A layer that raises Unsupported when it is made."""

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise unsupported(
            name, "...", "layers split over a process group are not provided", f"{instead} is their whole"
        )

    return type(name, (nn.Module,), {"__init__": __init__, "__doc__": f"Raises Unsupported; see {instead}."})
