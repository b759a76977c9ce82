"""`flash_attn.ops`."""

from __future__ import annotations
