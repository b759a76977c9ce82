"""Exact attention in linear memory, compiled on your machine for the device and framework you have.

    import anyflash as af
    out = af.attention(q, k, v, causal=True)

q, k and v are numpy arrays or torch tensors (batch, seqlen, heads, head_dim).
"""

from __future__ import annotations

import importlib
from types import ModuleType

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
    "Unsupported",
    "__version__",
    "attention",
    "attention_varlen",
    "exp",
    "explain",
    "log",
    "masks",
    "maximum",
    "merge",
    "minimum",
    "table",
    "tanh",
    "where",
]

# Frameworks' own extras. An attribute, not an import, so that importing anyflash imports no framework.
_FRAMEWORKS = {"torch": "anyflash.torch"}

_log.configure()


def __getattr__(name: str) -> ModuleType:
    if name in _FRAMEWORKS:
        return importlib.import_module(_FRAMEWORKS[name])
    raise AttributeError(f"module 'anyflash' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_FRAMEWORKS])
