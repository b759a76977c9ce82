"""Hugging Face transformers: `attn_implementation="anyflash"`.

    from anyflash.adapters import transformers as anyflash_for_transformers

    anyflash_for_transformers.install()
    model = AutoModel.from_pretrained(..., attn_implementation="anyflash")   # or
    model.set_attn_implementation("anyflash")

`install` registers the name with both of transformers' registries, attention and mask. A name that has only
the first would silently run without any mask.
"""

from __future__ import annotations

from typing import Any

from anyflash.adapters.base import Target

name = "transformers"
target = Target(
    package="transformers",
    module="transformers",
    minimum="5.22",
    below="5.24",
    how_to_install="pip install 'transformers>=5.22,<5.24'",
)
IMPLEMENTATION = "anyflash"

_replaced: dict[Any, Any] | None = None


def install() -> None:
    """Make `attn_implementation="anyflash"` available. Changes no model and no other implementation.

    Raises ImportError if transformers or torch is absent.
    """
    global _replaced
    if _replaced is not None:
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    from anyflash.adapters._transformers.attention import attention_for_transformers
    from anyflash.adapters._transformers.mask import mask_for_transformers

    target.warn_if_untested()
    registries = {
        AttentionInterface: attention_for_transformers,
        AttentionMaskInterface: mask_for_transformers,
    }
    _replaced = {registry: registry._global_mapping.get(IMPLEMENTATION) for registry in registries}
    for registry, function in registries.items():
        registry.register(IMPLEMENTATION, function)


def remove() -> None:
    """Take the name out of both registries, or put back what had it before."""
    global _replaced
    for registry, before in (_replaced or {}).items():
        if before is None:
            registry._global_mapping.pop(IMPLEMENTATION, None)
        else:
            registry.register(IMPLEMENTATION, before)
    _replaced = None


def self_check() -> str | None:
    """None if a tiny random Llama with padding agrees with its own attention; else what is wrong."""
    if target.installed() is None:
        return f"{target.package} is not installed: {target.how_to_install}"
    try:
        import torch
        from transformers import LlamaConfig, LlamaModel
    except ImportError as error:
        return f"cannot import {error.name or error}: {error}"

    was_installed = _replaced is not None
    state = torch.get_rng_state()
    install()
    try:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        model = LlamaModel(config).double().eval()
        tokens = torch.arange(24).reshape(2, 12)
        present = torch.ones(2, 12, dtype=torch.long)
        present[1, :5] = 0
        outputs = []
        for implementation in ("eager", IMPLEMENTATION):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                outputs.append(model(tokens, attention_mask=present).last_hidden_state[present.bool()])
        difference = float((outputs[0] - outputs[1]).abs().max())
        bound = 64 * torch.finfo(torch.float64).eps * float(outputs[0].abs().max())
        if not difference <= bound:
            return f"a tiny Llama differs from its own attention by {difference:.1e}, rounding by {bound:.1e}"
        return None
    finally:
        torch.set_rng_state(state)
        if not was_installed:
            remove()
