"""anyflash under the name flash_attn_interface: replaced by `anyflash.compat.flash_attn_interface`."""

from __future__ import annotations

from anyflash.compat.aliases import provide

provide(__name__)
