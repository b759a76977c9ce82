"""Hazy Research's fork of diffusers, which put FlashAttention into Stable Diffusion first.

    from anyflash.adapters import hazy_diffusers as anyflash_for_hazy_diffusers

    anyflash_for_hazy_diffusers.install()

The fork takes flash_attn where CUDA is, for heads of up to 128 columns in half precision. The methods put
here take every width and type, on any device, also in models that exist already. For diffusers of today there
is `anyflash.adapters.diffusers`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout


class _Fork(Target):
    """The fork's distribution is called as the original: at another version it is another program."""

    def installed(self) -> str | None:
        version = Target.installed(self)
        return version if version and self.tested(version) else None


name = "hazy_diffusers"
target = _Fork(
    package="diffusers",
    module="diffusers",
    minimum="0.6.0",
    below="0.6.1",
    how_to_install="pip install git+https://github.com/HazyResearch/diffusers",
)

source = Checkout(
    package="Hazy Research's diffusers",
    variable="ANYFLASH_SRC_HAZY_DIFFUSERS",
    repository="https://github.com/HazyResearch/diffusers",
    revision="be9ead2",
)

_undo: list[Callable[[], object]] = []


@contextmanager
def importable() -> Iterator[Path]:
    """Within: the modules of its models come from the checkout, without its pipelines."""
    with source.importable("diffusers", "diffusers.models", under="src") as root:
        # Its models write the version into their configuration.
        sys.modules["diffusers"].__version__ = target.minimum  # type: ignore[attr-defined]
        yield root


def install() -> None:
    """Give the fork's attention our methods. Raises ImportError if it or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from diffusers.models.attention import AttentionBlock, CrossAttention

    from anyflash.adapters._hazy_diffusers import attention as ours

    own = CrossAttention._attention, CrossAttention._sliced_attention, AttentionBlock.forward
    CrossAttention._attention = ours.attention
    CrossAttention._sliced_attention = ours.sliced_attention
    AttentionBlock.forward = ours.attention_block

    def undo() -> None:
        CrossAttention._attention, CrossAttention._sliced_attention, AttentionBlock.forward = own

    _undo.append(undo)


def remove() -> None:
    """Put the fork's own methods back."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if cross attention agrees with the fork's own; else what is wrong."""
    was_installed = bool(_undo)
    remove()
    try:
        import torch
        from diffusers.models.attention import CrossAttention

        from anyflash.adapters._hazy_diffusers.attention import attention
    except ImportError as error:
        return f"{error}: {target.how_to_install}"
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        layer = CrossAttention(16, 12, heads=2, dim_head=8)
        q, k, v = (torch.randn(2, rows, 16, dtype=torch.float64) for rows in (9, 5, 5))
        return disagreement("cross attention", attention(layer, q, k, v), layer._attention(q, k, v))
    finally:
        torch.set_rng_state(state)
        if was_installed:
            install()
