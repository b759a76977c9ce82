"""The `flash_attn` package, version 2.8, on anyflash.

It is known under that name after `anyflash.compat.install()`, under `anyflash run`, or where the distribution
packages/flash-attn is installed. Names, arguments, layouts and results are flash_attn's; every difference of
convention between the two is a row of `anyflash.compat.mapping`.
"""

from __future__ import annotations

from anyflash.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from anyflash.compat.version import FLASH_ATTN as __version__

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
