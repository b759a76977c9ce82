"""labml.ai's annotated Stable Diffusion: the attention of its U-Net and of its autoencoder.

    from anyflash.adapters import labml as anyflash_for_labml

    anyflash_for_labml.install()

Its own option for flash_attn, `CrossAttention.use_flash_attention`, works with `anyflash.compat` too; it
takes self-attention only, and pads heads of 40 columns to 64. The forwards put here take cross attention, any
width of head, and models that exist already.
"""

from __future__ import annotations

from collections.abc import Callable

from anyflash.adapters.base import Target, disagreement

name = "labml"
target = Target(
    package="labml-nn",
    module="labml_nn",
    minimum="0.5",
    below="0.6",
    how_to_install="pip install --no-deps 'labml-nn>=0.5,<0.6'",
)

_undo: list[Callable[[], object]] = []


def install() -> None:
    """Give labml's attention our forward. Raises ImportError if labml_nn or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from labml_nn.diffusion.stable_diffusion.model.autoencoder import AttnBlock
    from labml_nn.diffusion.stable_diffusion.model.unet_attention import CrossAttention

    from anyflash.adapters._labml.attention import cross_attention

    # labml kept CompVis' autoencoder by name and member, to read its checkpoints.
    from anyflash.adapters._stable_diffusion.attention import attention_block

    own = CrossAttention.forward, AttnBlock.forward
    CrossAttention.forward, AttnBlock.forward = cross_attention, attention_block

    def undo() -> None:
        CrossAttention.forward, AttnBlock.forward = own

    _undo.append(undo)


def remove() -> None:
    """Put labml's own forwards back."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if cross attention agrees with labml's own; else what is wrong."""
    absent = target.absent()
    if absent:
        return absent
    was_installed = bool(_undo)
    remove()
    try:
        import torch
        from labml_nn.diffusion.stable_diffusion.model.unet_attention import CrossAttention

        from anyflash.adapters._labml.attention import cross_attention
    except ImportError as error:
        return target.unusable(error)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        layer = CrossAttention(16, 12, 2, 8).double()
        x, text = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
        return disagreement("cross attention", cross_attention(layer, x, text), layer(x, text))
    finally:
        torch.set_rng_state(state)
        if was_installed:
            install()
