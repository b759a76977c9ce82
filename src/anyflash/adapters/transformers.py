"""Hugging Face transformers: `attn_implementation="anyflash"`.

    from anyflash.adapters import transformers as anyflash_for_transformers

    anyflash_for_transformers.install()
    model = AutoModel.from_pretrained(..., attn_implementation="anyflash")   # or
    model.set_attn_implementation("anyflash")

`install` registers the name with both of transformers' registries, attention and mask: a name that has only
the first would silently run without any mask. transformers takes every name that contains "flash" for a build
of the flash_attn package: it tries to load that, sends some models to another implementation, and refuses
others. So a model asked for "anyflash" is given the same two functions under a name that does not match,
"AnyFlash"; its config says so.

BLOOM, MPT and Falcon do not use the registry of attentions. Their layers get forwards that do as before
unless the model was given "anyflash".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from anyflash.adapters.base import Target, disagreement

name = "transformers"
target = Target(
    package="transformers",
    module="transformers",
    minimum="5.23",
    below="5.24",
    how_to_install="pip install 'transformers>=5.23,<5.24'",
)
IMPLEMENTATION = "anyflash"
_REGISTERED = "AnyFlash"

_undo: list[Callable[[], object]] = []


def install() -> None:
    """Make `attn_implementation="anyflash"` available. Changes no model and no other implementation.

    Raises ImportError if transformers or torch is absent.
    """
    if _undo:
        return
    target.warn_if_untested()
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    from anyflash.adapters._transformers import alibi_models
    from anyflash.adapters._transformers.attention import attention_for_transformers
    from anyflash.adapters._transformers.mask import mask_for_transformers

    for name in (IMPLEMENTATION, _REGISTERED):
        _register(AttentionInterface, name, attention_for_transformers)
        _register(AttentionMaskInterface, name, mask_for_transformers)
    for method in ("_check_and_adjust_attn_implementation", "get_correct_attn_implementation"):
        _translate(PreTrainedModel, method)
    _undo.extend(alibi_models.install((IMPLEMENTATION, _REGISTERED)))


def remove() -> None:
    """Take the name out of both registries, or put back what had it before."""
    while _undo:
        _undo.pop()()


def _register(registry: Any, name: str, function: Callable[..., Any]) -> None:
    before = registry._global_mapping.get(name)
    registry.register(name, function)
    if before is None:
        _undo.append(lambda: registry._global_mapping.pop(name, None))
    else:
        _undo.append(lambda: registry.register(name, before))


def _translate(model: Any, method: str) -> None:
    """Where transformers checks the name a model is asked for, ours becomes the one that it does not
    mistake."""
    own = vars(model)[method]

    @functools.wraps(own)
    def checked(self: Any, implementation: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, _REGISTERED if implementation == IMPLEMENTATION else implementation, *args, **kwargs)

    setattr(model, method, checked)
    _undo.append(lambda: setattr(model, method, own))


def self_check() -> str | None:
    """None if a tiny random Llama with padding agrees with its own attention; else what is wrong."""
    if (absent := target.absent()) is not None:
        return absent
    was_installed = bool(_undo)
    try:
        import torch
        from transformers import LlamaConfig, LlamaModel

        install()
    except ImportError as error:
        return target.unusable(error)

    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        model = LlamaModel(config).eval()
        tokens = torch.arange(24).reshape(2, 12)
        present = torch.ones(2, 12, dtype=torch.long)
        present[1, :5] = 0
        outputs = []
        for implementation in ("eager", IMPLEMENTATION):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                outputs.append(model(tokens, attention_mask=present).last_hidden_state[present.bool()])
        return disagreement("a tiny Llama", outputs[1], outputs[0])
    finally:
        torch.set_rng_state(state)
        if not was_installed:
            remove()
