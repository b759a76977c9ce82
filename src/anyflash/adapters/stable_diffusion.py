"""Stable Diffusion as CompVis published it (`ldm`): the attention of its UNet and of its autoencoder.

    from anyflash.adapters import stable_diffusion as anyflash_for_stable_diffusion

    anyflash_for_stable_diffusion.install()

Both classes get another forward, also in models that exist already; their weights are used as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

name = "stable_diffusion"
target = Target(
    package="latent-diffusion",
    module="ldm",
    minimum="0.0.1",
    below="0.1",
    how_to_install="git clone https://github.com/CompVis/stable-diffusion && pip install ./stable-diffusion",
)

source = Checkout(
    package="CompVis' stable-diffusion",
    variable="ANYFLASH_SRC_LDM",
    repository="https://github.com/CompVis/stable-diffusion",
    revision="21f890f",
)

_undo: list[Callable[[], object]] = []


@contextmanager
def importable() -> Iterator[Path]:
    """Within: its modules come from the checkout."""
    settings = "omegaconf.listconfig"
    with source.importable(stubs=("omegaconf", settings)) as root:
        # The UNet looks for this class only to turn its instances into lists.
        sys.modules[settings].ListConfig = type("ListConfig", (), {})  # type: ignore[attr-defined]
        yield root


def install() -> None:
    """Give ldm's attention our forward. Raises ImportError if ldm or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules.model import AttnBlock

    from anyflash.adapters._stable_diffusion.attention import attention_block, cross_attention

    own = CrossAttention.forward, AttnBlock.forward
    CrossAttention.forward, AttnBlock.forward = cross_attention, attention_block

    def undo() -> None:
        CrossAttention.forward, AttnBlock.forward = own

    _undo.append(undo)


def remove() -> None:
    """Put ldm's own forwards back."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if cross attention agrees with ldm's own; else what is wrong."""
    was_installed = bool(_undo)
    remove()
    try:
        import torch
        from ldm.modules.attention import CrossAttention

        from anyflash.adapters._stable_diffusion.attention import cross_attention
    except ImportError as error:
        return f"{error}: {target.how_to_install}"
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        layer = CrossAttention(16, 12, heads=2, dim_head=8).double()
        x, text = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
        own = layer(x, text)
        return disagreement("cross attention", cross_attention(layer, x, text), own)
    finally:
        torch.set_rng_state(state)
        if was_installed:
            install()
