"""`flash_attn.modules`."""

from __future__ import annotations
