"""Gluon's element types and torch's."""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon import language as gl

_PAIRS = (
    (gl.int1, torch.bool),
    (gl.int8, torch.int8),
    (gl.int16, torch.int16),
    (gl.int32, torch.int32),
    (gl.int64, torch.int64),
    (gl.uint8, torch.uint8),
    (gl.float16, torch.float16),
    (gl.bfloat16, torch.bfloat16),
    (gl.float32, torch.float32),
    (gl.float64, torch.float64),
    (gl.float8e4nv, torch.float8_e4m3fn),
    (gl.float8e5, torch.float8_e5m2),
)
_TORCH = {ours.name: theirs for ours, theirs in _PAIRS}
_GLUON = {theirs: ours for ours, theirs in _PAIRS}


def to_torch(dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return _TORCH[dtype.name]


def to_gluon(dtype: torch.dtype) -> Any:
    return _GLUON[dtype]
