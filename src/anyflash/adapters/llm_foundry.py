"""llm-foundry: the attention of its MPT models, `attn_impl: torch` and `attn_impl: flash`.

    from anyflash.adapters import llm_foundry as anyflash_for_llm_foundry

    anyflash_for_llm_foundry.install()
    model = MPTForCausalLM(MPTConfig(attn_config={"attn_impl": "torch", "alibi": True}, ...))

`install` puts our functions under both names of llm-foundry's registry of attention implementations, where
models look theirs up as they are made; MPT refuses other names. For "flash" it imports the flash_attn package
too, which packs its tokens: `anyflash.compat.install()` before llmfoundry is imported gives it one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyflash.adapters.base import Target, disagreement

name = "llm_foundry"
target = Target(
    package="llm-foundry",
    module="llmfoundry",
    minimum="0.22",
    below="0.23",
    how_to_install="pip install 'llm-foundry>=0.22,<0.23'",
)

_undo: list[Callable[[], object]] = []


def install() -> None:
    """Register our functions. Models that exist already keep what they have.

    Raises ImportError if llm-foundry or torch is absent.
    """
    if _undo:
        return
    target.warn_if_untested()
    from llmfoundry.layers_registry import attention_implementations
    from llmfoundry.models.layers import attention  # noqa: F401 - registers its own

    from anyflash.adapters._llm_foundry.attention import flash, torch_function

    for implementation, ours in (("torch", torch_function), ("flash", lambda _: flash)):
        theirs = attention_implementations.get(implementation)
        attention_implementations.register(implementation, func=ours(theirs))
        _undo.append(_registering(attention_implementations, implementation, theirs))


def remove() -> None:
    """Put llm-foundry's own functions back. Models made meanwhile keep ours."""
    while _undo:
        _undo.pop()()


def _registering(registry: Any, implementation: str, function: Any) -> Callable[[], object]:
    return lambda: registry.register(implementation, func=function)


def self_check() -> str | None:
    """None if ours agrees with llm-foundry's "torch" on a causal call with ALiBi; else what is wrong."""
    if absent := target.absent():
        return absent
    was_installed = bool(_undo)
    remove()
    try:
        import torch
        from llmfoundry.layers_registry import attention_implementations
        from llmfoundry.models.layers import attention  # noqa: F401 - registers its own

        from anyflash.adapters._llm_foundry.attention import torch_function
    except ImportError as error:
        return target.unusable(error)
    try:
        generator = torch.Generator().manual_seed(0)
        q, k, v, bias = (
            torch.randn(s, dtype=torch.float64, generator=generator)
            for s in ((2, 7, 32), (2, 7, 16), (2, 7, 16), (1, 4, 1, 7))
        )
        own = attention_implementations.get("torch")
        call = {"n_heads": 4, "kv_n_heads": 2, "attn_bias": bias, "is_causal": True}
        return disagreement(
            "causal attention with ALiBi", torch_function(own)(q, k, v, **call)[0], own(q, k, v, **call)[0]
        )
    finally:
        if was_installed:
            install()
