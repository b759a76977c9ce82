"""Hazy Research's diffusers: its own modules where ANYFLASH_SRC_HAZY_DIFFUSERS names a checkout, and by their
members."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import anyflash.compat  # noqa: E402
from anyflash.adapters import hazy_diffusers as adapter  # noqa: E402
from anyflash.adapters._hazy_diffusers import attention as ours  # noqa: E402

SOURCE = adapter.source
DOUBLE = torch.float64


def close(found: torch.Tensor, wanted: torch.Tensor, computed: torch.dtype | None = None) -> None:
    """`computed`: the type that the other side computed in, where that is narrower."""
    assert found.shape == wanted.shape
    bound = 256 * torch.finfo(computed or wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


@pytest.mark.parametrize("dim", [40, 80, 160])
def test_members(dim: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, rows, 3 * dim, dtype=DOUBLE) for rows in (9, 5, 5))
    heads = [t.unflatten(-1, (3, dim)) for t in (q, k, v)]
    weights = (torch.einsum("bqhd,bkhd->bhqk", *heads[:2]) * 0.2).softmax(-1)
    wanted = torch.einsum("bhqk,bkhd->bqhd", weights, heads[2]).flatten(2)
    layer = SimpleNamespace(heads=3, scale=0.2)
    close(ours.attention(layer, q, k, v), wanted)
    close(ours.sliced_attention(layer, q, k, v, 9, 3 * dim), wanted)


@pytest.mark.parametrize("heads", [1, 2])
def test_block_members(heads: int) -> None:
    torch.manual_seed(0)
    maps = {n: torch.nn.Linear(8, 8, dtype=DOUBLE) for n in ("query", "key", "value", "proj_attn")}
    x = torch.randn(2, 8, 3, 5, dtype=DOUBLE)
    rows = x.flatten(2).mT
    q, k, v = (maps[n](rows).unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
    inner = ((q @ k.mT * (8 / heads) ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    wanted = (maps["proj_attn"](inner).mT.reshape(x.shape) + x) / 2.0
    layer = SimpleNamespace(group_norm=lambda t: t, num_heads=heads, rescale_output_factor=2.0, **maps)
    close(ours.attention_block(layer, x), wanted)


def test_diffusers_of_today_is_not_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork's distribution has the same name."""
    for version, there in (("0.42.1", None), (adapter.target.minimum, adapter.target.minimum)):
        monkeypatch.setattr("importlib.metadata.version", lambda _, version=version: version)
        assert adapter.target.installed() == there


@pytest.fixture
def fork() -> Iterator[None]:
    if SOURCE.folder() is None:
        pytest.skip(f"{SOURCE.variable} names no checkout of Hazy Research's diffusers")
    for needed in ("einops", "huggingface_hub", "requests"):
        pytest.importorskip(needed)
    with adapter.importable():
        yield
        adapter.remove()


def modules() -> dict[str, tuple[Any, tuple[torch.Tensor, ...]]]:
    theirs = importlib.import_module("diffusers.models.attention")
    image = torch.randn(2, 32, 4, 3, dtype=DOUBLE, requires_grad=True)
    rows = torch.randn(2, 9, 16, dtype=DOUBLE, requires_grad=True)
    text = torch.randn(2, 7, 12, dtype=DOUBLE, requires_grad=True)
    sliced = theirs.CrossAttention(16, 12, heads=2, dim_head=8)
    sliced._slice_size = 1
    return {
        "transformer": (theirs.SpatialTransformer(32, 2, 16, context_dim=12), (image, text)),
        "autoencoder": (theirs.AttentionBlock(32), (image,)),
        "heads": (theirs.AttentionBlock(32, num_head_channels=16), (image,)),
        "self-attention": (theirs.CrossAttention(16, heads=2, dim_head=8), (rows,)),
        "wide": (theirs.CrossAttention(16, 12, heads=2, dim_head=160), (rows, text)),
        "sliced": (sliced, (rows, text)),
    }


@pytest.mark.usefixtures("fork")
@pytest.mark.parametrize("name", ["transformer", "autoencoder", "heads", "self-attention", "wide", "sliced"])
def test_module(name: str) -> None:
    """Its own modules in float64: outputs and gradients."""
    torch.manual_seed(0)
    layer, inputs = modules()[name]
    layer = layer.double()
    leaves = (*inputs, *layer.parameters())
    results = []
    for installed in (False, True):
        if installed:
            adapter.install()
        elif name == "sliced":
            # Its own slices fail: they are not split into heads. Whole, it is the same attention.
            layer._slice_size = None
        out = layer(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        if name == "sliced":
            layer._slice_size = 1
    # The autoencoder's softmax is in float32, whatever the type.
    computed = torch.float32 if hasattr(layer, "proj_attn") else DOUBLE
    top = max(float(t.detach().abs().max()) for t in results[0][1:])
    for own, mine in zip(*results, strict=True):
        # A bias of the keys shifts whole rows before the softmax: its gradient is rounding itself.
        if float(own.detach().abs().max()) > 64 * torch.finfo(computed).eps * top:
            close(mine, own, computed)
    assert adapter.self_check() is None


@pytest.mark.usefixtures("fork")
def test_unet() -> None:
    """A whole UNet with heads of 40 and 80."""
    torch.manual_seed(0)
    unet = (
        importlib.import_module("diffusers.models.unet_2d_condition")
        .UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=(320, 640),
            cross_attention_dim=12,
            attention_head_dim=8,
        )
        .eval()
    )
    inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 7, 12)
    with torch.no_grad():
        own = unet(*inputs).sample
        adapter.install()
        close(unet(*inputs).sample, own)


@pytest.mark.usefixtures("fork")
def test_its_own_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA is, the fork takes flash_attn in half precision. Told that it is, it takes ours by that
    name, without the adapter: self- and cross-attention, as near to float32 as its own is, twice over."""
    anyflash.compat.install()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=8, minor=0))
            theirs = importlib.import_module("diffusers.models.attention")
        assert theirs.flash_attn_installed
        torch.manual_seed(0)
        block = theirs.SpatialTransformer(64, 2, 32, context_dim=12)
        image, text = torch.randn(2, 64, 9, 7), torch.randn(2, 5, 12)
        with torch.no_grad():
            wanted = block(image, text)
            narrow = [t.to(torch.bfloat16) for t in (image, text)]
            flash = block.bfloat16()(*narrow)
            theirs.flash_attn_installed = False
            plain = block(*narrow)
        errors = [float((t.float() - wanted).square().mean().sqrt()) for t in (flash, plain)]
        assert not torch.equal(flash, plain)
        assert errors[0] <= 2 * errors[1]
    finally:
        anyflash.compat.remove()


@pytest.mark.usefixtures("fork")
def test_remove_undoes_install() -> None:
    theirs = importlib.import_module("diffusers.models.attention")

    def state() -> tuple[Any, ...]:
        attention, block = theirs.CrossAttention, theirs.AttentionBlock
        return attention._attention, attention._sliced_attention, block.forward

    before = state()
    adapter.install()
    adapter.install()
    assert all(now is not then for now, then in zip(state(), before, strict=True))
    adapter.remove()
    assert state() == before
    adapter.remove()
    assert adapter.self_check() is None
    assert state() == before
