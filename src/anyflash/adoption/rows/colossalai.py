"""Colossal-AI: `ColoAttention` on a padded batch, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyflash.adapters import colossalai as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

_HEADS, _DIM = 12, 64


class _System:
    """Colossal-AI's attention and its own kernel, as long as its modules are there."""

    def __init__(self) -> None:
        self.attention: Any = None
        self.kernel: Any = None

    @contextmanager
    def installed(self, role: Role) -> Iterator[None]:
        with adapter.importable():
            from colossalai.kernel.extensions import FlashAttentionSdpaCudaExtension
            from colossalai.shardformer.layer.attn import ColoAttention

            if role == "ours":
                adapter.install()
            self.attention, self.kernel = ColoAttention, FlashAttentionSdpaCudaExtension().load()
            try:
                yield
            finally:
                adapter.remove()


def _build(quick: bool) -> Workload:
    import torch

    batch, longest = (2, 512) if quick else (4, 1024)
    texts = sorted(corpus.passages(16 * batch, longest // 48, longest // 6), key=len, reverse=True)
    lengths = [min(len(text), longest) for text in texts[::16]]
    longest = max(lengths)
    present = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, batch, _HEADS, longest, _DIM, generator=generator)
    weights = torch.randn(batch, longest, _HEADS, _DIM, generator=generator)[present.bool()]
    system = _System()

    def attend(role: Role, q: Any, k: Any, v: Any) -> Any:
        prepared = system.attention.prepare_attn_kwargs(
            (batch, 1, longest, longest), q.dtype, q.device, q_padding_mask=present, is_causal=True
        )
        if role == "ours":
            return system.attention.attention(q, k, v, **prepared)
        mask = prepared["attention_mask"]
        if role == "best":
            return system.kernel(q, k, v, attention_mask=mask)
        return (q @ k.mT * _DIM**-0.5 + mask).softmax(-1) @ v

    def step(role: Role, dtype: Any = torch.float32) -> Result:
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        out = attend(role, *leaf.unbind(0)).transpose(1, 2)[present.bool()]
        (out * weights.to(dtype)).sum().backward()
        assert leaf.grad is not None
        return Result({"out": out.detach().numpy()}, {"qkv": leaf.grad.numpy()})

    def reference() -> Result:
        with system.installed("eager"):
            return step("eager", torch.float64)

    labels: dict[Role, str] = {"eager": "scores", "best": "Colossal-AI's kernel (SDPA)", "ours": "anyflash"}
    return Workload(
        f"ColoAttention, {_HEADS} heads of {_DIM}, causal, {batch} sequences of {min(lengths)} to {longest} "
        "bytes padded to the longest, masks prepared by Colossal-AI: forward and backward of attention "
        "alone; it offers its kernels on a GPU only, so its SDPA kernel is called past its loader",
        "float32",
        step,
        reference,
        tuple(Variant(role, label, partial(system.installed, role)) for role, label in labels.items()),
    )


ROWS = [
    Row(
        "colossalai-attention",
        "Colossal-AI",
        "ColoAttention on a padded batch",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement("einops", "pip install einops"),
            adapter.source,
        ),
        _build,
    )
]
