"""OpenFold: the calls that it makes, and its own modules where ANYFLASH_SRC_OPENFOLD names a checkout."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anyflash.adapters import openfold as adapter  # noqa: E402
from anyflash.adapters._openfold.attention import attention_for_openfold  # noqa: E402

SOURCE = adapter.source
DOUBLE = torch.float64

# What OpenFold hands to `_attention`, by position: the shape of q, k and v, and those of the biases.
CALLS = {
    "row": ((1, 5, 2, 7, 8), [(1, 5, 1, 1, 7), (1, 1, 2, 7, 7)]),
    "triangle": ((1, 7, 2, 7, 8), [(1, 7, 1, 1, 7), (1, 1, 2, 7, 7)]),
    "column": ((1, 7, 2, 5, 8), [(1, 7, 1, 1, 5)]),
    "several-entries": ((2, 5, 2, 7, 8), [(2, 5, 1, 1, 7), (2, 1, 2, 7, 7)]),
    "chunk": ((3, 2, 7, 8), [(3, 1, 1, 7), (1, 2, 7, 7)]),
    "templates": ((1, 2, 3, 2, 7, 8), [(1, 2, 3, 1, 1, 7), (1, 2, 1, 2, 7, 7)]),
    "no-bias": ((1, 5, 2, 7, 8), []),
    "one-number": ((1, 5, 2, 7, 8), [(1, 1, 1, 1, 1)]),
}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 256 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    """Outputs and every gradient, those of the biases included; a mask of -1e9 covers whole rows."""
    torch.manual_seed(0)
    shape, biases = CALLS[name]
    q, k, v = (torch.randn(shape, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    given = [torch.randn(s, dtype=DOUBLE) for s in biases]
    if given:
        given[0].view(-1)[:3] = -1e9
    leaves = [q, k, v, *(b.requires_grad_() for b in given)]
    scores = q @ k.transpose(-1, -2)
    for bias in given:
        scores = scores + bias
    wanted, found = scores.softmax(-1) @ v, attention_for_openfold(q, k, v, given)
    close(found, wanted)
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (found, wanted)]
    for mine, own in zip(*gradients, strict=True):
        # The one number added to all scores has no effect; its gradient is rounding itself.
        if own.numel() > 1:
            close(mine, own)


def test_absent() -> None:
    if importlib.util.find_spec("openfold") is None:
        assert "openfold" in (adapter.self_check() or "")


@pytest.fixture
def openfold() -> Iterator[None]:
    """The checkout's modules without its packages' own imports, which want all of its dependencies."""
    if SOURCE.folder() is None:
        pytest.skip(f"{SOURCE.variable} names no checkout of OpenFold")
    pytest.importorskip("scipy")
    with adapter.importable():
        yield


def triangle(starting: bool) -> tuple[Any, tuple[torch.Tensor, ...], torch.Tensor]:
    module = importlib.import_module("openfold.model.triangular_attention")
    pair = torch.randn(1, 7, 7, 16, dtype=DOUBLE, requires_grad=True)
    return module.TriangleAttention(16, 8, 4, starting=starting), (pair,), torch.rand(1, 7, 7) > 0.2


def row() -> tuple[Any, tuple[torch.Tensor, ...], torch.Tensor]:
    module = importlib.import_module("openfold.model.msa")
    alignment = torch.randn(1, 5, 7, 16, dtype=DOUBLE, requires_grad=True)
    pair = torch.randn(1, 7, 7, 12, dtype=DOUBLE, requires_grad=True)
    return module.MSARowAttentionWithPairBias(16, 12, 8, 4), (alignment, pair), torch.rand(1, 5, 7) > 0.2


def column() -> tuple[Any, tuple[torch.Tensor, ...], torch.Tensor]:
    module = importlib.import_module("openfold.model.msa")
    alignment = torch.randn(1, 5, 7, 16, dtype=DOUBLE, requires_grad=True)
    return module.MSAColumnAttention(16, 8, 4), (alignment,), torch.rand(1, 5, 7) > 0.2


MODULES = {
    "starting": lambda: triangle(True),
    "ending": lambda: triangle(False),
    "row": row,
    "column": column,
}


@pytest.mark.usefixtures("openfold")
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, chunk_size: int | None) -> None:
    """Outputs and gradients of its own modules, whole and by its chunks."""
    torch.manual_seed(0)
    layer, inputs, mask = MODULES[name]()
    layer = layer.double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    leaves = (*inputs, *layer.parameters())
    results = []
    for ours in (False, True):
        if ours:
            adapter.install()
        try:
            out = layer(*inputs, mask=mask.double(), chunk_size=chunk_size)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        finally:
            adapter.remove()
    for own, mine in zip(*results, strict=True):
        # A bias before the softmax that shifts a whole row has no effect; its gradient is rounding itself.
        if float(own.detach().abs().max()) > 1e-9:
            close(mine, own)
    assert adapter.self_check() is None
