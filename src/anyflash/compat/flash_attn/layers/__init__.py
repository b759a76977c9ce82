"""`flash_attn.layers`."""

from __future__ import annotations
