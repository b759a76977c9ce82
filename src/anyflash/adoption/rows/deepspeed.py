"""DeepSpeed: the Evoformer's attention with its two biases, which it runs on a GPU only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyflash.adapters import deepspeed as adapter
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

# AlphaFold's: 8 heads of 32 over the alignment.
_HEADS, _DIM = 8, 32


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

    rows, length = (16, 128) if quick else (32, 256)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, rows, length, _HEADS, _DIM, generator=generator)
    pair = torch.randn(1, 1, _HEADS, length, length, generator=generator)
    mask = torch.zeros(1, rows, 1, 1, length)
    mask[..., -length // 8 :] = -1e9

    def step(role: Role, dtype: Any = torch.float32) -> Result:
        leaf, bias = (t.to(dtype).requires_grad_() for t in (qkv, pair))
        leaf.grad = bias.grad = None
        out = _attend(role, *leaf.unbind(0), mask.to(dtype), bias)
        out.square().mean().backward()
        assert leaf.grad is not None
        assert bias.grad is not None
        return Result(
            {"out": out.detach().numpy()}, {"qkv": leaf.grad.numpy(), "pair bias": bias.grad.numpy()}
        )

    labels: dict[Role, str] = {"eager": "scores", "best": "torch's SDPA on the sum", "ours": "anyflash"}
    return Workload(
        f"DS4Sci_EvoformerAttention, {rows} rows of {length}, {_HEADS} heads of {_DIM}, mask and pair bias: "
        "forward and backward; DeepSpeed has no kernel of its own for a CPU, so the definition and torch's "
        "attention on the sum of the biases stand for it",
        "float32",
        step,
        lambda: step("eager", torch.float64),
        tuple(Variant(role, label, partial(_installed, role)) for role, label in labels.items()),
    )


def _attend(role: Role, q: Any, k: Any, v: Any, mask: Any, pair: Any) -> Any:
    import torch
    from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention

    if role == "ours":
        return DS4Sci_EvoformerAttention(q, k, v, [mask, pair])
    q, k, v = (t.transpose(2, 3) for t in (q, k, v))
    if role == "best":
        both = (mask + pair)[0]
        heads = torch.nn.functional.scaled_dot_product_attention(q[0], k[0], v[0], attn_mask=both)
        return heads[None].transpose(2, 3)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + mask + pair
    return (scores.softmax(-1) @ v).transpose(2, 3)


ROWS = [
    Row(
        "deepspeed-evoformer",
        "DeepSpeed",
        "DS4Sci_EvoformerAttention, forward and backward",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement("deepspeed", adapter.target.how_to_install),
        ),
        _build,
    )
]
