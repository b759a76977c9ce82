"""`flash_attn.ops.triton`."""

from __future__ import annotations
