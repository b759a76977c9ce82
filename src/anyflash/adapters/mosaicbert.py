"""MosaicBERT, as mosaicml/examples has it in benchmarks/bert/src/bert_layers.py.

    from anyflash.adapters import mosaicbert as anyflash_for_mosaicbert

    anyflash_for_mosaicbert.install()

`install` gives our forwards to the encoder and the self-attention of the `bert_layers` that is imported, by
whatever path; where none is, it imports `bert_layers`. Models that exist already are reached too.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

name = "mosaicbert"
target = Target(
    package="mosaicml-examples",
    module="bert_layers",
    minimum="0.0.3",
    below="0.1",
    how_to_install="git clone https://github.com/mosaicml/examples, "
    "and have its folder examples/benchmarks/bert/src on PYTHONPATH",
)
source = Checkout(
    package="mosaicml/examples",
    variable="ANYFLASH_SRC_MOSAIC_EXAMPLES",
    repository="https://github.com/mosaicml/examples",
    revision="daddaef",
)

_undo: list[Callable[[], object]] = []


@contextmanager
def importable() -> Iterator[Path]:
    """Within: `bert_layers` comes from the checkout."""
    path = list(sys.path)
    try:
        with source.importable(under="examples/benchmarks/bert/src") as root:
            yield root
    finally:
        # The module itself adds its folder once more.
        sys.path[:] = path


def install() -> None:
    """Give MosaicBERT's classes our forwards. Raises ImportError if `bert_layers` or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from anyflash.adapters._mosaicbert.attention import encoder_forward, self_attention

    for module in _loaded() or [importlib.import_module("bert_layers")]:
        encoder, attention = module.BertEncoder, module.BertUnpadSelfAttention
        own = encoder.forward, attention.forward
        encoder.forward, attention.forward = encoder_forward(own[0]), self_attention
        _undo.append(_restoring(encoder, attention, *own))


def remove() -> None:
    """Put MosaicBERT's own forwards back."""
    while _undo:
        _undo.pop()()


def _loaded() -> list[ModuleType]:
    found = [m for name, m in list(sys.modules.items()) if name.rpartition(".")[2] == "bert_layers"]
    return [m for m in found if hasattr(m, "BertUnpadSelfAttention")]


def _restoring(encoder: Any, attention: Any, encode: Any, attend: Any) -> Callable[[], None]:
    def undo() -> None:
        encoder.forward, attention.forward = encode, attend

    return undo


def self_check() -> str | None:
    """None if a self-attention with padding and ALiBi agrees with MosaicBERT's own; else what is wrong."""
    was_installed = bool(_undo)
    remove()
    try:
        import torch

        module = (_loaded() or [importlib.import_module("bert_layers")])[0]
        from anyflash.adapters._mosaicbert.attention import Alibi, self_attention
    except ImportError as error:
        return f"{error}: {target.how_to_install}"
    state = torch.get_rng_state()
    kernel = module.flash_attn_qkvpacked_func
    try:
        torch.manual_seed(0)
        config = SimpleNamespace(hidden_size=16, num_attention_heads=2, attention_probs_dropout_prob=0.0)
        layer = module.BertUnpadSelfAttention(config).double()
        x = torch.randn(12, 16, dtype=torch.float64)
        # Without its kernel, which would take these numbers in half precision.
        module.flash_attn_qkvpacked_func = None
        kept = torch.ones(2, 7, dtype=torch.int32)
        kept[1, 5:] = 0
        bounds, places = torch.tensor([0, 7, 12], dtype=torch.int32), kept.flatten().nonzero().flatten()
        slopes = torch.tensor([0.25, 0.0625])
        distance = (torch.arange(7)[:, None] - torch.arange(7)).abs()
        bias = (1 - kept[:, None, None]) * -10000.0 - slopes[:, None, None] * distance
        own = type(layer).forward(layer, x, bounds, 7, places, kept, bias)
        ours = self_attention(layer, x, bounds, 7, places, kept, Alibi(slopes, None))
        return disagreement("self-attention with padding and ALiBi", ours, own)
    finally:
        module.flash_attn_qkvpacked_func = kernel
        torch.set_rng_state(state)
        if was_installed:
            install()
