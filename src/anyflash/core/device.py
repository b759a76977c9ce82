"""Where memory lies."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """`kind` is "cpu", "cuda", "hip" or "metal"; `index` counts devices of that kind."""

    kind: str
    index: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.index, which nobody wants

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu")
