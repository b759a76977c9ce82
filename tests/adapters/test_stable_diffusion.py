"""CompVis' attention classes, themselves where ANYFLASH_SRC_LDM names a checkout, and by their members."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anyflash.adapters import stable_diffusion as adapter  # noqa: E402
from anyflash.adapters._stable_diffusion.attention import attention_block, cross_attention  # noqa: E402

SOURCE = adapter.source
DOUBLE = torch.float64


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 256 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [40, 80, 160])
def test_members(dim: int, masked: bool) -> None:
    """What the classes are called with and made of: x, context and mask; projections, heads and scale."""
    torch.manual_seed(0)
    x, text = torch.randn(2, 9, 16, dtype=DOUBLE), torch.randn(2, 7, 12, dtype=DOUBLE)
    maps = [torch.nn.Linear(n, 2 * dim, bias=False, dtype=DOUBLE) for n in (16, 12, 12)]
    layer = SimpleNamespace(to_q=maps[0], to_k=maps[1], to_v=maps[2], to_out=lambda t: t, heads=2, scale=0.2)
    mask = torch.tensor([[True] * 4 + [False] * 3, [False] * 7]) if masked else None
    q, k, v = (m(t).unflatten(-1, (2, dim)) for m, t in zip(maps, (x, text, text), strict=True))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.2
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.finfo(DOUBLE).max)
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    close(cross_attention(layer, x, text, mask), wanted)


def test_block_members() -> None:
    torch.manual_seed(0)
    convolutions = {n: torch.nn.Conv2d(8, 8, 1, dtype=DOUBLE) for n in ("q", "k", "v", "proj_out")}
    x = torch.randn(2, 8, 3, 5, dtype=DOUBLE)
    q, k, v = (convolutions[n](x).flatten(2).transpose(1, 2) for n in "qkv")
    inner = ((q @ k.transpose(1, 2) * 8**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    close(
        attention_block(SimpleNamespace(norm=lambda t: t, **convolutions), x),
        x + convolutions["proj_out"](inner),
    )


@pytest.fixture
def ldm() -> Iterator[None]:
    if SOURCE.folder() is None:
        pytest.skip(f"{SOURCE.variable} names no checkout of CompVis' stable-diffusion")
    for needed in ("einops", "PIL"):
        pytest.importorskip(needed)
    with adapter.importable():
        yield
        adapter.remove()


def modules() -> list[tuple[Any, tuple[torch.Tensor, ...]]]:
    torch.manual_seed(0)
    attention = importlib.import_module("ldm.modules.attention")
    model = importlib.import_module("ldm.modules.diffusionmodules.model")
    image, text = torch.randn(2, 32, 4, 4, dtype=DOUBLE), torch.randn(2, 7, 12, dtype=DOUBLE)
    block = attention.SpatialTransformer(32, 2, 16, context_dim=12)
    torch.nn.init.normal_(block.proj_out.weight, std=0.2)
    return [
        (block, (image.requires_grad_(), text.requires_grad_())),
        (model.AttnBlock(32), (image,)),
        (
            attention.CrossAttention(16, heads=2, dim_head=8),
            (torch.randn(2, 9, 16, dtype=DOUBLE).requires_grad_(),),
        ),
    ]


@pytest.mark.usefixtures("ldm")
@pytest.mark.parametrize("which", [0, 1, 2], ids=["transformer", "autoencoder", "self-attention"])
def test_module(which: int) -> None:
    """Its own modules: outputs and gradients."""
    layer, inputs = modules()[which]
    layer = layer.double()
    leaves = (*inputs, *layer.parameters())
    results = []
    for ours in (False, True):
        if ours:
            adapter.install()
        out = layer(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    adapter.remove()
    top = max(float(t.detach().abs().max()) for t in results[0][1:])
    for own, mine in zip(*results, strict=True):
        # A bias of the keys shifts whole rows before the softmax: its gradient is rounding itself.
        if float(own.detach().abs().max()) > 1e-9 * top:
            close(mine, own)
    assert adapter.self_check() is None


@pytest.mark.usefixtures("ldm")
def test_unet() -> None:
    """A small UNet with heads of 40 and 80, in the type that it computes its time embedding in."""
    torch.manual_seed(0)
    unet = (
        importlib.import_module("ldm.modules.diffusionmodules.openaimodel")
        .UNetModel(
            image_size=8,
            in_channels=4,
            model_channels=320,
            out_channels=4,
            num_res_blocks=1,
            attention_resolutions=[1, 2],
            channel_mult=(1, 2),
            num_heads=8,
            use_spatial_transformer=True,
            context_dim=12,
            use_checkpoint=False,
            legacy=False,
        )
        .eval()
    )
    for parameter in unet.parameters():
        if not parameter.any() and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 7, 12)
    with torch.no_grad():
        own = unet(*inputs)
        adapter.install()
        close(unet(*inputs), own)
