"""Exact attention in linear memory, compiled on your machine for the device and framework you have.

    import anyflash as af
    out = af.attention(q, k, v, causal=True)

q, k and v are numpy arrays or torch tensors (batch, seqlen, heads, head_dim).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anyflash import masks
from anyflash.api import attention, attention_varlen, explain, merge, table
from anyflash.core import log as _log
from anyflash.core.errors import AnyflashError, BackendBroken, InvalidCall, Unsupported
from anyflash.semantics.expr import exp, log, maximum, minimum, tanh, where

__version__ = "0.1.0"

__all__ = [
    "AnyflashError",
    "BackendBroken",
    "InvalidCall",
    "KVCache",
    "Unsupported",
    "__version__",
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "exp",
    "explain",
    "kvcache",
    "log",
    "masks",
    "maximum",
    "merge",
    "minimum",
    "table",
    "tanh",
    "where",
]

if TYPE_CHECKING:
    from anyflash import kvcache
    from anyflash import torch as torch
    from anyflash.kvcache import KVCache, attention_kvcache

# Imported when first asked for: a framework's own extras, because importing anyflash imports no framework,
# and what only serving needs, because importing anyflash is quick.
_LATER = {
    "torch": "anyflash.torch",
    "kvcache": "anyflash.kvcache",
    "KVCache": "anyflash.kvcache",
    "attention_kvcache": "anyflash.kvcache",
}

_log.configure()


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'anyflash' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    found = globals()[name] = getattr(module, name, module)
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *_LATER})
