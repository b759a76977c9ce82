"""anyflash under the name flash_attn: the module is replaced by `anyflash.compat.flash_attn`."""

from __future__ import annotations

from anyflash.compat.aliases import provide

provide(__name__)
