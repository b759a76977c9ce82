"""xformers: attention over packed sequences, which it runs on a GPU only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyflash.adapters import xformers as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

_HEADS, _DIM = 8, 64


@contextmanager
def _installed(role: Role) -> Iterator[None]:
    if role == "ours":
        adapter.install()
    try:
        yield
    finally:
        adapter.remove()


def _build(quick: bool) -> Workload:
    import torch
    from xformers.ops import fmha

    texts = corpus.passages(8 if quick else 24, 12, 250)
    lengths = [len(text.split()) for text in texts]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, total, _HEADS, _DIM, generator=generator)
    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths)

    def step(role: Role, inputs: Any = qkv) -> Result:
        leaf = inputs.clone().requires_grad_()
        out = _attend(role, *leaf.unbind(0), bias)
        out.square().mean().backward()
        return Result({"out": out.detach().numpy()}, {"qkv": leaf.grad.numpy()})

    labels: dict[Role, str] = {"eager": "scores", "best": "torch's SDPA with the mask", "ours": "anyflash"}
    return Workload(
        f"memory_efficient_attention, {len(lengths)} texts of {min(lengths)}-{max(lengths)} words, packed to "
        f"{total} rows, causal, {_HEADS} heads of {_DIM}: forward and backward; xformers has no operator "
        "for a CPU, so the definition in its documentation and torch's attention stand for it",
        "float32",
        step,
        lambda: step("eager", qkv.double()),
        tuple(Variant(role, label, partial(_installed, role)) for role, label in labels.items()),
    )


def _attend(role: Role, q: Any, k: Any, v: Any, bias: Any) -> Any:
    import torch
    from xformers.ops import fmha

    if role == "ours":
        return fmha.memory_efficient_attention(q, k, v, attn_bias=bias)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = bias.materialize((1, 1, q.shape[2], k.shape[2]), dtype=q.dtype)
    if role == "best":
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + mask
    return (scores.softmax(-1) @ v).transpose(1, 2)


ROWS = [
    Row(
        "xformers-packed",
        "xformers",
        "attention over packed texts, forward and backward",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement("xformers", adapter.target.how_to_install),
        ),
        _build,
    )
]
