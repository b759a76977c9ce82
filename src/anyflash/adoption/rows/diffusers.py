"""Hugging Face diffusers: one denoising step of a UNet with Stable Diffusion's attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyflash.adapters import diffusers as adapter
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload


@contextmanager
def _attention(model: Any, role: Role) -> Iterator[None]:
    from diffusers.models.attention_dispatch import attention_backend
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model.set_attn_processor(AttnProcessor() if role == "eager" else AttnProcessor2_0())
    adapter.install()
    try:
        with attention_backend(adapter.BACKEND if role == "ours" else "native"):
            yield
    finally:
        adapter.remove()


def _build(quick: bool) -> Workload:
    import torch
    from diffusers import UNet2DConditionModel

    side, batch = (32, 1) if quick else (64, 1)
    # The two upper levels of Stable Diffusion 1's four, where nearly all of its attention is.
    widths, heads, tokens = (320, 640), 8, 77
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=widths,
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=heads,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    image, text = torch.randn(batch, 4, side, side), torch.randn(batch, tokens, 768)

    def denoise(network: Any) -> Result:
        dtype = next(network.parameters()).dtype
        with torch.no_grad():
            return Result({"noise": network(image.to(dtype), 500, text.to(dtype)).sample.numpy()}, {})

    def reference() -> Result:
        return denoise(copy.deepcopy(model).double())

    parameters = sum(p.numel() for p in model.parameters())
    labels: dict[Role, str] = {"eager": "AttnProcessor", "best": "AttnProcessor2_0", "ours": "anyflash"}
    return Workload(
        f"UNet of {len(widths)} levels, {parameters / 1e6:.0f} M parameters (random), {heads} heads of "
        f"{widths[0] // heads} and {widths[1] // heads}, "
        f"latent {side} x {side}, {tokens} tokens of text: forward",
        "float32",
        lambda role: denoise(model),
        reference,
        tuple(Variant(role, label, partial(_attention, model, role)) for role, label in labels.items()),
    )


ROWS = [
    Row(
        "diffusers-unet",
        "Hugging Face diffusers",
        "one denoising step of a UNet",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement("diffusers", adapter.target.how_to_install),
        ),
        _build,
    )
]
