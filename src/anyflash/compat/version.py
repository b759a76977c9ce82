"""The versions that the drop-in answers with."""

from __future__ import annotations

# The flash_attn whose names and behaviour are provided. xformers 0.0.35 takes 2.7.1 to 2.8.4, transformers 5
# takes 2.3.3 and later, diffusers 2.6.3 and later.
FLASH_ATTN = "2.8.3"
