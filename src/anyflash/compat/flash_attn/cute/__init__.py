"""`flash_attn.cute`, generation 4, on anyflash."""

from __future__ import annotations

from anyflash.compat.flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
