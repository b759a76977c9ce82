"""Megatron-LM (megatron-core): the attention of layers that Megatron's local spec builds.

    from anyflash.adapters import megatron as anyflash_for_megatron

    anyflash_for_megatron.install()
    model = GPTModel(config, get_gpt_layer_local_spec(), ...)

`install` gives Megatron's `DotProductAttention` our forward, for models that exist already too. For one model
only, set `spec.submodules.self_attention.submodules.core_attention = anyflash_for_megatron.core_attention()`.
"""

from __future__ import annotations

from collections.abc import Callable

from anyflash.adapters.base import Target, disagreement

name = "megatron"
target = Target(
    package="megatron-core",
    module="megatron.core",
    minimum="0.16",
    below="0.17",
    how_to_install="pip install 'megatron-core>=0.16,<0.17'",
)

_undo: list[Callable[[], object]] = []


def core_attention() -> type:
    """A core attention for a `ModuleSpec`. Raises ImportError if megatron-core or torch is absent."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from anyflash.adapters._megatron.attention import forward

    return type("AnyflashAttention", (DotProductAttention,), {"forward": forward})


def install() -> None:
    """Put our forward into Megatron's attention. Raises ImportError if megatron-core or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from anyflash.adapters._megatron.attention import forward

    own = DotProductAttention.forward
    DotProductAttention.forward = forward
    _undo.append(lambda: setattr(DotProductAttention, "forward", own))


def remove() -> None:
    """Put Megatron's own forward back."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if causal attention of grouped heads is that of the definition; else what is wrong."""
    if (absent := target.absent()) is not None:
        return absent
    try:
        import torch
        from megatron.core.transformer.enums import AttnMaskType

        from anyflash.adapters._megatron.attention import forward
    except ImportError as error:
        return target.unusable(error)
    from types import SimpleNamespace

    layer = SimpleNamespace(
        scale_mask_softmax=SimpleNamespace(window_size=None, scale=None),
        softmax_scale=8**-0.5,
        softmax_offset=None,
        attention_dropout=SimpleNamespace(p=0.0),
        training=False,
        attn_mask_type=AttnMaskType.causal,
    )
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(7, 2, n, 8, dtype=torch.float64, generator=generator) for n in (4, 2))
    ours = forward(layer, q, k, k, None)
    keys = k.repeat_interleave(2, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, keys) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -10000.0)
    own = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), keys).flatten(2)
    return disagreement("causal attention of grouped heads", ours, own)
