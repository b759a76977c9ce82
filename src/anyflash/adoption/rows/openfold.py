"""OpenFold: triangle attention, whole, by its own chunks and ours, and how long a protein each can take."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyflash.adapters import openfold as adapter
from anyflash.adoption import checkouts
from anyflash.adoption.row import Reach, Requirement, Result, Role, Row, Variant, Workload

# AlphaFold's pair representation and its heads.
_WIDTH, _DIM, _HEADS = 128, 32, 4
# AlphaFold's chunks are of 4 rows, for the sake of their scores. Ours has none, so they may be larger.
_CHUNKS: dict[Role, int | None] = {"eager": None, "best": 4, "ours": 16}
_LABELS: dict[Role, str] = {"eager": "OpenFold", "best": "its chunks", "ours": "anyflash, its chunks"}


@contextmanager
def _attention(role: Role) -> Iterator[None]:
    if role == "ours":
        adapter.install()
    try:
        yield
    finally:
        adapter.remove()


def _kept(length: int) -> int:
    return length - length // 8


def _pair(length: int) -> tuple[Any, Any]:
    """A pair representation and its mask: an eighth of the residues is padding."""
    import torch

    generator = torch.Generator().manual_seed(0)
    present = (torch.arange(length) < _kept(length)).float()
    return torch.randn(1, length, length, _WIDTH, generator=generator), torch.outer(present, present)[None]


def _layer() -> Any:
    import torch
    from openfold.model.triangular_attention import TriangleAttentionStartingNode

    torch.manual_seed(0)
    layer = TriangleAttentionStartingNode(_WIDTH, _DIM, _HEADS).eval()
    # As made it gives zeros, and so does its gate.
    for parameter in layer.mha.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer


def _build(quick: bool) -> Workload:
    import torch

    checkouts.keep(adapter.importable())
    layer, length = _layer(), 128 if quick else 256
    pair, mask = _pair(length)

    def update(network: Any, role: Role, x: Any, present: Any) -> Any:
        with torch.inference_mode():
            out = network(x, mask=present, chunk_size=_CHUNKS[role])
        # Of padding, which is masked by a finite number, only rounding would be compared.
        kept = _kept(x.shape[1])
        return out[:, :kept, :kept]

    def step(role: Role) -> Result:
        return Result({"pair": update(layer, role, pair, mask).numpy()}, {})

    def reference() -> Result:
        exact = update(copy.deepcopy(layer).double(), "eager", pair.double(), mask.double())
        return Result({"pair": exact.numpy()}, {})

    reach = Reach(
        "residues",
        (128 if quick else 512) << 20,
        range(64, 2049, 32),
        lambda role, size: partial(update, layer, role, *_pair(size)),
    )
    return Workload(
        f"TriangleAttentionStartingNode, {length} residues, {_HEADS} heads of {_DIM}, mask and pair bias: "
        f"forward; whole, by its chunks of {_CHUNKS['best']} rows, and ours by chunks of {_CHUNKS['ours']}",
        "float32",
        step,
        reference,
        tuple(Variant(role, label, partial(_attention, role)) for role, label in _LABELS.items()),
        reach=reach,
    )


def _build_training(quick: bool) -> Workload:
    checkouts.keep(adapter.importable())
    from openfold.model import primitives

    layer, length = _layer(), 96 if quick else 192
    pair, mask = _pair(length)

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
        out = out[:, : _kept(x.shape[1]), : _kept(x.shape[1])]
        out.square().mean().backward()
        assert leaf.grad is not None
        gradients = {n: p.grad.numpy() for n, p in network.named_parameters()}
        return Result({"pair": out.detach().numpy()}, gradients | {"pair": leaf.grad.numpy()})

    labels: dict[Role, str] = {"eager": "OpenFold", "best": "torch's SDPA on the sum", "ours": "anyflash"}
    return Workload(
        f"TriangleAttentionStartingNode, {length} residues, {_HEADS} heads of {_DIM}, mask and pair bias: "
        "forward and backward, with the gradient of the bias; its own memory-saving attention is for "
        "inference or a GPU, so torch's on the sum of the biases stands for it",
        "float32",
        lambda role: train(layer, pair, mask),
        lambda: train(copy.deepcopy(layer).double(), pair.double(), mask.double()),
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
