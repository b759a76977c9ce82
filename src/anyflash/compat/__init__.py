"""Programs written for flash_attn, on anyflash: nothing here happens unless it is asked for.

    import anyflash.compat
    anyflash.compat.install()      # from here on `import flash_attn` finds anyflash
    from flash_attn import flash_attn_func

`anyflash run program.py` does the same for a program that cannot be edited, and the distribution
packages/flash-attn for a whole environment. `anyflash.compat.mapping` lists every difference of convention.
"""

from __future__ import annotations

from anyflash.compat.door import install, remove

__all__ = ["install", "remove"]
