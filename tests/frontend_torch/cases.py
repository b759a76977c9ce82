"""Calls of attention on torch tensors, on which every property of the frontend is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import anyflash as af
from anyflash.backends import registry

BACKENDS = [
    name
    for name, entry in registry.entries().items()
    if entry.reason is None and name in ("reference", "cpu")
]
DENSE = {"q": (2, 3, 4, 5), "k": (2, 6, 2, 5), "v": (2, 6, 2, 3)}
HEADS_FIRST = {"q": (2, 4, 3, 5), "k": (2, 2, 6, 5), "v": (2, 2, 6, 3)}
PACKED = {"q": (7, 4, 5), "k": (9, 2, 5), "v": (9, 2, 3)}
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
KEEP = torch.tensor([True, True, False, True, True, True])


@dataclass(frozen=True)
class Case:
    """One call. `extra` gives names and shapes of further differentiable tensors, from which `keywords` makes
    the call's keywords."""

    id: str
    shapes: dict[str, tuple[int, ...]]
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    keywords: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda _: {}

    @property
    def packed(self) -> bool:
        return len(self.shapes["q"]) == 3

    @property
    def dropout(self) -> bool:
        return "dropout_p" in self.keywords(self.tensors())

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Random tensors of the call that require gradients, q, k, v first."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for name, shape in (self.shapes | self.extra).items()
        }

    def run(self, tensors: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        call = af.attention_varlen if self.packed else af.attention
        return call(q, k, v, return_lse=True, backend=backend, **self.keywords(tensors))

    def function(self, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """The call as a function of its tensors in order."""
        names = list(self.shapes | self.extra)
        return lambda *tensors: self.run(dict(zip(names, tensors, strict=True)), backend)


def _lengths(t: dict[str, Tensor], **more: list[int]) -> dict[str, Any]:
    """Three sequences, the second without queries; rows and keys behind them belong to none."""
    lists = {"cu_seqlens_q": [0, 3, 3, 6], "cu_seqlens_k": [0, 4, 6, 8], **more}
    device = t["q"].device
    return {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in lists.items()}


def _formula(t: dict[str, Tensor]) -> dict[str, Any]:
    slopes = t["slopes"]
    return {"score": lambda s, at: 3 * af.tanh(s / 3) - af.table(slopes)[at.head] * (at.q - at.k)}


def _documents(t: dict[str, Tensor]) -> dict[str, Any]:
    device = t["q"].device
    documents, keep = af.table(DOCUMENTS.to(device)), af.table(KEEP.to(device))
    weight = af.table(t["weight"])
    return {
        "score": lambda s, at: s * weight[at.batch, at.k],
        "mask": lambda at: (documents[at.batch, at.row] == documents[at.batch, at.k]) & keep[at.k],
    }


CASES = [
    Case("plain", DENSE),
    Case("causal-softcap", DENSE, {}, lambda t: {"causal": True, "softcap": 2.0, "scale": 0.7}),
    Case("bhsd-window", HEADS_FIRST, {}, lambda t: {"layout": "bhsd", "window": (2, 1)}),
    Case("alibi", DENSE, {"slopes": (4,)}, lambda t: {"alibi_slopes": t["slopes"], "causal": True}),
    Case(
        "two-biases",
        DENSE,
        {"row": (2, 1, 3, 6), "key": (4, 1, 6)},
        lambda t: {"bias": [t["row"], t["key"]]},
    ),
    Case("sinks", DENSE, {"sinks": (4,)}, lambda t: {"sinks": t["sinks"], "causal": True}),
    Case("formula", DENSE, {"slopes": (4,)}, _formula),
    Case("documents", DENSE, {"weight": (2, 6)}, _documents),
    Case("dense-mask", DENSE, {}, lambda t: {"mask": KEEP.to(t["q"].device)}),
    Case(
        "all-at-once",
        HEADS_FIRST,
        {"slopes": (2, 4), "bias": (3, 6), "sinks": (4,)},
        lambda t: {
            "layout": "bhsd",
            "causal": True,
            "softcap": 4.0,
            "alibi_slopes": t["slopes"],
            "bias": t["bias"],
            "sinks": t["sinks"],
        },
    ),
    Case("dropout", DENSE, {}, lambda t: {"dropout_p": 0.4, "seed": 11}),
    Case("packed", PACKED, {}, lambda t: {"causal": True} | _lengths(t)),
    Case("packed-formula", PACKED, {"slopes": (4,)}, lambda t: _formula(t) | _lengths(t)),
    Case(
        "packed-used-sinks",
        PACKED,
        {"sinks": (4,)},
        lambda t: {"sinks": t["sinks"]} | _lengths(t, seqused_k=[2, 0, 1]),
    ),
]

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def gradients(results: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed, uneven sum over the finite results."""
    total = torch.zeros((), dtype=torch.float64)
    for result in results:
        weights = torch.linspace(-1.0, 1.0, result.numel(), dtype=torch.float64).reshape(result.shape)
        total = total + (torch.where(result.isfinite(), result, 0.0).double() * weights).sum()
    return list(torch.autograd.grad(total, inputs))


def assert_close(found: Tensor, expected: Tensor, terms: int) -> None:
    """Equal up to the rounding of `terms` sums in another order, relative to the largest element."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    bound = 4 * terms * torch.finfo(expected.dtype).eps
    assert torch.equal(found.isinf(), expected.isinf())
    finite = expected.isfinite()
    found, expected = found[finite], expected[finite]
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0.0, atol=bound * max(scale, 1.0))
