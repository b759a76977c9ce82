"""Attention over a KV cache, and a container of caches for a server."""

from __future__ import annotations

from anyflash.kvcache.attention import KVCache, attention_kvcache
from anyflash.kvcache.paged import Batch, Memory, PagedCache

__all__ = ["Batch", "KVCache", "Memory", "PagedCache", "attention_kvcache"]
