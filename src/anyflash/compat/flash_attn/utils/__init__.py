"""`flash_attn.utils`."""

from __future__ import annotations
