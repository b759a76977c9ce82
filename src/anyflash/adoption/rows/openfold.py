"""OpenFold: triangle attention, whole, by its own chunks and ours, and how long a protein each can take."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyflash.adapters import openfold as adapter
from anyflash.adoption import checkouts
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload
from anyflash.adoption.rows._triangle import DIM, HEADS, WIDTH, kept, pair, spread, workload


@contextmanager
def _attention(role: Role) -> Iterator[None]:
    if role == "ours":
        adapter.install()
    try:
        yield
    finally:
        adapter.remove()


def _layer() -> Any:
    import torch
    from openfold.model.triangular_attention import TriangleAttentionStartingNode

    torch.manual_seed(0)
    return spread(TriangleAttentionStartingNode(WIDTH, DIM, HEADS).eval())


def _build(quick: bool) -> Workload:
    checkouts.keep(adapter.importable())
    layer = _layer()
    return workload("OpenFold", layer, lambda x, mask, chunk: layer(x, mask, chunk), _attention, quick)


def _build_training(quick: bool) -> Workload:
    checkouts.keep(adapter.importable())
    from openfold.model import primitives

    layer, length = _layer(), 96 if quick else 192
    x, mask = pair(length)

    @contextmanager
    def attention(role: Role) -> Iterator[None]:
        own = primitives._attention
        if role == "best":
            primitives._attention = _by_torch
        try:
            with _attention(role):
                yield
        finally:
            primitives._attention = own

    def train(network: Any, x: Any, present: Any) -> Result:
        network.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        out = network(leaf, mask=present)
        out = out[:, : kept(x.shape[1]), : kept(x.shape[1])]
        out.square().mean().backward()
        assert leaf.grad is not None
        gradients = {n: p.grad.numpy() for n, p in network.named_parameters()}
        return Result({"pair": out.detach().numpy()}, gradients | {"pair": leaf.grad.numpy()})

    labels: dict[Role, str] = {"eager": "OpenFold", "best": "torch's SDPA on the sum", "ours": "anyflash"}
    return Workload(
        f"TriangleAttentionStartingNode, {length} residues, {HEADS} heads of {DIM}, mask and pair bias: "
        "forward and backward, with the gradient of the bias; its own memory-saving attention is for "
        "inference or a GPU, so torch's on the sum of the biases stands for it",
        "float32",
        lambda role: train(layer, x, mask),
        lambda: train(copy.deepcopy(layer).double(), x.double(), mask.double()),
        tuple(Variant(role, label, partial(attention, role)) for role, label in labels.items()),
    )


def _by_torch(query: Any, key: Any, value: Any, biases: list[Any]) -> Any:
    import torch

    whole = sum(biases[1:], biases[0])
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=whole, scale=1.0)


_REQUIRES = (
    Requirement("torch", "pip install torch==2.13.0"),
    Requirement("scipy", "pip install scipy"),
    adapter.source,
)
ROWS = [
    Row("openfold-triangle", "OpenFold", "triangle attention, and the longest that fits", _REQUIRES, _build),
    Row("openfold-training", "OpenFold", "triangle attention, training step", _REQUIRES, _build_training),
]
