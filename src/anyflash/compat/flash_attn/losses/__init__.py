"""`flash_attn.losses`."""

from __future__ import annotations
