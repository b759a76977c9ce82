"""Colossal-AI: the attention of its sharded models (`ColoAttention`), on the CPU.

    from anyflash.adapters import colossalai as anyflash_for_colossalai

    anyflash_for_colossalai.install()

`install` registers an extension with the kernel loaders that `ColoAttention` asks; without it they have no
kernel for a CPU. On a GPU Colossal-AI's own kernels stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

name = "colossalai"
target = Target(
    package="colossalai",
    module="colossalai",
    minimum="0.5",
    below="0.6",
    how_to_install="pip install --no-deps --no-build-isolation 'colossalai>=0.5,<0.6'",
)
source = Checkout(
    package="colossalai",
    variable="ANYFLASH_SRC_COLOSSALAI",
    repository="https://github.com/hpcaitech/ColossalAI",
    revision="v0.5.0",
)

_LOADERS = (
    "FlashAttentionLoader",
    "FlashAttentionDaoLoader",
    "FlashAttentionWithCustomMaskLoader",
    "FlashAttentionForFloatAndCustomMaskLoader",
)
# Where `ColoAttention` keeps the kernels that it has loaded.
_LOADED = ("_kernel_dispatch_map", "_flash_kernel_dispatch")

_undo: list[Callable[[], object]] = []


def importable() -> AbstractContextManager[Path]:
    """Within: its modules come from the checkout, without what the packages around its attention import."""
    return source.importable("colossalai", "colossalai.shardformer", "colossalai.shardformer.layer")


def install() -> None:
    """Offer our kernel to Colossal-AI's loaders. Raises ImportError if Colossal-AI or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from colossalai.kernel import kernel_loader

    from anyflash.adapters._colossalai.extension import AnyflashExtension

    loaders = [getattr(kernel_loader, each) for each in _LOADERS]
    for loader in loaders:
        loader.register_extension(AnyflashExtension)
    attention = _attention()
    loaded = {each: getattr(attention, each, None) for each in _LOADED}
    _set(attention, dict.fromkeys(_LOADED))

    def undo() -> None:
        for loader in loaders:
            loader.REGISTRY.remove(AnyflashExtension)
        _set(_attention(), loaded)

    _undo.append(undo)


def remove() -> None:
    """Withdraw it, and give Colossal-AI the kernels back that it had loaded."""
    while _undo:
        _undo.pop()()


def _attention() -> Any:
    """`ColoAttention`, if something has imported it; we do not, as it brings all of Colossal-AI."""
    return getattr(sys.modules.get("colossalai.shardformer.layer.attn"), "ColoAttention", None)


def _set(attention: Any, loaded: dict[str, Any]) -> None:
    if attention is not None:
        for each, kernels in loaded.items():
            setattr(attention, each, kernels)


def self_check() -> str | None:
    """None if the kernel that a loader gives is attention with a custom mask; else what is wrong."""
    was_installed = bool(_undo)
    try:
        import torch
        from colossalai.kernel.kernel_loader import FlashAttentionForFloatAndCustomMaskLoader

        install()
    except ImportError as error:
        return target.absent() or target.unusable(error)
    try:
        generator = torch.Generator().manual_seed(0)
        shapes = ((2, 3, 7, 8),) * 3 + ((2, 1, 7, 7),)
        q, k, v, mask = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
        kernel = FlashAttentionForFloatAndCustomMaskLoader().load("anyflash")
        own = (q * 8**-0.5 @ k.mT + mask).softmax(-1) @ v
        return disagreement("attention with a mask", kernel(q, k, v, attention_mask=mask), own)
    finally:
        if not was_installed:
            remove()
