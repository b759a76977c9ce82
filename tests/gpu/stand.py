"""What takes the place of a tensor where a kernel is compiled and not run."""

from __future__ import annotations

from typing import Any


class Stand:
    """A tensor argument, aligned to 16 bytes, without memory; `dtype` is torch's."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        return 0
