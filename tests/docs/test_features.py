"""Each row of the README's table of features is run as it stands, on every framework and backend it names.

The reference in float64 says what is right. Everything is float64, so what differs is only the order of sums.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import anyflash
from docs.fences import ROOT

B, T, H, D = 2, 24, 4, 16
ROW = re.compile(
    r"^\| (?P<feature>[^|`]+) \| `(?P<call>[^`]+)` \| (?P<frameworks>[^|]+) \| (?P<backends>[^|]+) \|$"
)
ROWS = [match for line in (ROOT / "README.md").read_text("utf-8").splitlines() if (match := ROW.match(line))]
# Each result is a few sums of at most T * D terms, whose order differs between backends.
BOUND = 100 * T * D * np.finfo(np.float64).eps


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ("q", "k", "v")
    return {
        **{name: rng.standard_normal((B, T, H, D)) for name in names},
        "packed": rng.standard_normal((T, H, D)),
        "starts": np.array([0, 10, 10, 24], np.int32),
        "ids": np.repeat([0, 1, 2], [7, 9, 8]).astype(np.int32),
        "dense": rng.random((B, 1, T, T)) < 0.5,
        "slopes": 2.0 ** -np.arange(1, H + 1),
        "bias": rng.standard_normal((1, H, T, T)),
        "row_bias": rng.standard_normal((B, 1, 1, T)),
        "sinks": rng.standard_normal(H),
        "gates": rng.standard_normal(H),
        "k_pages": rng.standard_normal((12, 8, H, D)),
        "v_pages": rng.standard_normal((12, 8, H, D)),
        "used": np.array([20, 5], np.int32),
        "block_table": rng.permutation(12).astype(np.int32).reshape(B, 6),
    }


def _names(wrap: Callable[[np.ndarray], Any], backend: str) -> dict[str, Any]:
    """What a call in the table may name; every attention in it is bound to `backend`."""
    af = SimpleNamespace(**{name: getattr(anyflash, name) for name in anyflash.__all__})
    af.attention = partial(anyflash.attention, backend=backend)
    af.attention_varlen = partial(anyflash.attention_varlen, backend=backend)
    af.attention_kvcache = partial(anyflash.attention_kvcache, backend=backend)
    return {"af": af, **{name: wrap(array) for name, array in _arrays().items()}}


@cache
def _right(call: str) -> np.ndarray:
    return eval(call, _names(lambda array: array, "reference"))


def _gradients(call: str, backend: str) -> dict[str, np.ndarray]:
    names = _names(_tensor, backend)
    eval(call, names).square().sum().backward()
    tensors = {name: value for name, value in names.items() if isinstance(value, torch.Tensor)}
    return {name: tensor.grad.numpy() for name, tensor in tensors.items() if tensor.grad is not None}


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).requires_grad_(array.dtype.kind == "f")


_right_gradients = cache(partial(_gradients, backend="reference"))


def _close(found: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.abs(found - right).max() <= BOUND * max(1.0, np.abs(right).max()))


def _split(column: str) -> list[str]:
    return [part.strip() for part in column.split(",")]


CASES = [
    pytest.param(row["call"], framework, backend, id=f"{row['feature']}-{framework}-{backend}")
    for row in ROWS
    for framework in _split(row["frameworks"])
    for backend in _split(row["backends"])
]


def test_table_is_found() -> None:
    assert len(ROWS) > 10


@pytest.mark.parametrize(("call", "framework", "backend"), CASES)
def test_feature(call: str, framework: str, backend: str) -> None:
    if framework == "numpy":
        assert _close(eval(call, _names(lambda array: array, backend)), _right(call))
        return
    assert framework == "torch"
    trained = "attention_kvcache" not in call
    with torch.set_grad_enabled(trained):
        assert _close(eval(call, _names(_tensor, backend)).detach().numpy(), _right(call))
    if not trained:
        return
    found, right = _gradients(call, backend), _right_gradients(call)
    assert found.keys() == right.keys()
    used = set(re.findall(r"\w+", call)) & {
        "q",
        "k",
        "v",
        "packed",
        "bias",
        "row_bias",
        "slopes",
        "sinks",
        "gates",
    }
    assert set(found) == used, "every array that the call reads has a gradient"
    for name in found:
        assert _close(found[name], right[name]), name
