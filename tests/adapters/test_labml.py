"""labml.ai's Stable Diffusion: its own modules, forward and gradients, beside their own attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("labml_nn", reason="`make test` installs it where it can")

from labml_nn.diffusion.stable_diffusion.model.autoencoder import AttnBlock  # noqa: E402
from labml_nn.diffusion.stable_diffusion.model.unet import UNetModel  # noqa: E402
from labml_nn.diffusion.stable_diffusion.model.unet_attention import (  # noqa: E402
    CrossAttention,
    SpatialTransformer,
)

from anyflash.adapters import labml as adapter  # noqa: E402

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def removed() -> Iterator[None]:
    yield
    adapter.remove()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 256 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


def image(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 4, 3, dtype=DOUBLE, requires_grad=True)


def text() -> torch.Tensor:
    return torch.randn(2, 7, 12, dtype=DOUBLE, requires_grad=True)


MODULES = {
    "transformer": lambda: (SpatialTransformer(64, 2, 1, 12), (image(64), text())),
    "autoencoder": lambda: (AttnBlock(32), (image(32),)),
    "self-attention": lambda: (CrossAttention(16, 16, 2, 8, is_inplace=False), (image(16).flatten(2).mT,)),
    "wide": lambda: (CrossAttention(16, 12, 2, 160), (image(16).flatten(2).mT, text())),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str) -> None:
    torch.manual_seed(0)
    layer, inputs = MODULES[name]()
    layer = layer.double()
    leaves = (*inputs, *layer.parameters())
    results = []
    for ours in (False, True):
        if ours:
            adapter.install()
        out = layer(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    top = max(float(t.detach().abs().max()) for t in results[0][1:])
    for own, mine in zip(*results, strict=True):
        # A bias of the keys shifts whole rows before the softmax: its gradient is rounding itself.
        if float(own.detach().abs().max()) > 1e-9 * top:
            close(mine, own)


def test_unet() -> None:
    """A whole U-Net with heads of 40, 80 and 160, made before `install`."""
    torch.manual_seed(0)
    unet = UNetModel(
        in_channels=4,
        out_channels=4,
        channels=320,
        n_res_blocks=1,
        attention_levels=[0, 1, 2],
        channel_multipliers=[1, 2, 4],
        n_heads=8,
        d_cond=12,
    ).eval()
    inputs: Any = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 7, 12)
    with torch.no_grad():
        own = unet(*inputs)
        adapter.install()
        close(unet(*inputs), own)


def test_remove_undoes_install() -> None:
    before = CrossAttention.forward, AttnBlock.forward
    adapter.install()
    adapter.install()
    assert CrossAttention.forward is not before[0]
    assert AttnBlock.forward is not before[1]
    adapter.remove()
    assert (CrossAttention.forward, AttnBlock.forward) == before
    adapter.remove()
    assert adapter.self_check() is None
    assert (CrossAttention.forward, AttnBlock.forward) == before
