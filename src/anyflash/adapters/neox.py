"""GPT-NeoX: layers whose `attention_config` says "flash".

    from anyflash.adapters import neox as anyflash_for_neox

    anyflash_for_neox.install()   # and in the configuration: "attention_config": [[["flash"], "all"]]

NeoX imports flash_attn when it builds such a layer. `install` opens the door of `anyflash.compat`, so that
layers built from then on find anyflash; nothing of NeoX's attention is replaced. Processes that NeoX's
launcher starts inherit nothing: for those, install the distribution packages/flash-attn.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

name = "neox"
target = Target(
    package="gpt-neox",
    module="megatron.model.transformer",
    minimum="2.0",
    below="3",
    how_to_install="git clone https://github.com/EleutherAI/gpt-neox && export PYTHONPATH=$PWD/gpt-neox",
)
source = Checkout(
    package="GPT-NeoX",
    variable="ANYFLASH_SRC_NEOX",
    repository="https://github.com/EleutherAI/gpt-neox",
    revision="ea7aefd8",
)

_undo: list[Callable[[], object]] = []


@contextmanager
def importable() -> Iterator[Path]:
    """Within: its modules come from the checkout, without the imports of its packages."""
    old = "pkg_resources"
    stubs = () if importlib.util.find_spec(old) else (old,)
    bare = ("megatron", "megatron.model", "megatron.neox_arguments")
    with source.importable(*bare, stubs=stubs) as root:
        sys.modules["megatron"].print_rank_0 = print  # type: ignore[attr-defined]
        if stubs:
            # Of what setuptools has dropped, NeoX uses the copy of another package.
            importlib.import_module("packaging.version")
            sys.modules[old].packaging = sys.modules["packaging"]  # type: ignore[attr-defined]
        yield root


def install() -> None:
    """Let NeoX find us as flash_attn. Raises ImportError if NeoX or torch is absent, InvalidCall if another
    flash_attn has been imported already."""
    if _undo:
        return
    target.warn_if_untested()
    from anyflash.compat import door

    door.hold(name)
    try:
        transformer: Any = importlib.import_module(target.module)
        ours = importlib.import_module("flash_attn.ops.activations").swiglu
    except ImportError:
        door.release(name)
        raise
    _warn_if_too_old(transformer.ParallelSelfAttention)
    # NeoX looks for it as it is imported, which may have been before.
    own = None if transformer.swiglu is ours else transformer.swiglu
    transformer.swiglu = ours

    def undo() -> None:
        transformer.swiglu = own
        door.release(name)

    _undo.append(undo)


def remove() -> None:
    """Close the door again. Layers that were built meanwhile keep what they have."""
    while _undo:
        _undo.pop()()


def _warn_if_too_old(layer: Any) -> None:
    attend = getattr(layer, "flash_attention", None)
    if attend is None or "flash_varlen_qkv_fn" not in attend.__code__.co_names:
        warnings.warn(
            "this GPT-NeoX calls version 1 of flash_attn, in part its extension module; "
            f"this adapter is tested with {source.repository} at {source.revision}",
            stacklevel=3,
        )


def self_check() -> str | None:
    """None if NeoX's flash layers, training and in evaluation, compute causal attention of grouped heads with
    ALiBi; else what is wrong."""
    was_installed = bool(_undo)
    try:
        import torch

        install()
        transformer = importlib.import_module(target.module)
    except ImportError as error:
        return f"{error}: {target.how_to_install}"
    try:
        flash = importlib.import_module("flash_attn.flash_attn_interface")
        generator = torch.Generator().manual_seed(0)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        q, k, v = (torch.randn(7, 2, n, 8, dtype=torch.float64, generator=generator) for n in (4, 2, 2))
        layer = SimpleNamespace(
            use_flash_attention=True,
            use_triton=False,
            num_kv_heads_per_partition=2,
            sliding_window_width=None,
            pos_emb="alibi",
            alibi_embed=SimpleNamespace(slopes=slopes),
            dropout_p=0.0,
            flash_qkv_fn=flash.flash_attn_func,
            flash_varlen_qkv_fn=flash.flash_attn_varlen_func,
        )
        distance = torch.arange(7)[:, None] - torch.arange(7)
        keys, values = (t.repeat_interleave(2, 2) for t in (k, v))
        scores = torch.einsum("qbhd,kbhd->bhqk", q, keys) * 8**-0.5 - slopes[:, None, None] * distance
        own = torch.einsum(
            "bhqk,kbhd->bhqd", scores.masked_fill(distance < 0, -torch.inf).softmax(-1), values
        )
        for layer.training in (True, False):
            ours = transformer.ParallelSelfAttention.flash_attention(layer, q, k, v)
            wrong = disagreement(f"attention with training={layer.training}", ours, own)
            if wrong is not None:
                return wrong
        return None
    finally:
        if not was_installed:
            remove()
