"""PyTorch's own attention: everything that calls `torch.nn.functional.scaled_dot_product_attention`.

    from anyflash.adapters import pytorch as anyflash_for_pytorch

    with anyflash_for_pytorch.use():
        loss = model(x)                 # nn.TransformerEncoder, nn.MultiheadAttention, your own F.sdpa calls

`install` and `remove` are `anyflash.torch.activate` and `deactivate`. They use torch's registry of flash
attentions, under the name "anyflash": `torch.nn.attention.activate_flash_attention_impl("anyflash")` does the
same, and activating another one takes ours away. While it is active, in the whole process:

- the function is ours, with all that torch itself gives to its attention of quadratic memory: dropout, masks
  that require gradients, values of another width;
- so are the operators below it on the CPU (_pytorch/operators.py), and with them varlen_attn;
- the fused inference path of nn.TransformerEncoderLayer, which bypasses the function and forms the score
  matrix, is switched off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anyflash.adapters.base import Target, disagreement

name = "pytorch"
target = Target(
    package="torch",
    module="torch",
    minimum="2.13",
    below="2.14",
    how_to_install="pip install torch==2.13.0",
)
IMPLEMENTATION = "anyflash"

_before: str | None = None


class _Handle:
    """What torch's registry holds while we are active."""

    def __init__(self) -> None:
        import torch

        from anyflash.adapters._pytorch import functional, operators

        torchs = torch.nn.functional
        self._own = torchs.scaled_dot_product_attention
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        self._operators: Any = operators.register()
        functional.torchs_own = self._own
        torchs.scaled_dot_product_attention = functional.scaled_dot_product_attention
        torch.backends.mha.set_fastpath_enabled(False)

    def remove(self) -> None:
        import torch

        torch.nn.functional.scaled_dot_product_attention = self._own
        torch.backends.mha.set_fastpath_enabled(self._fast_path)
        self._operators._destroy()


def register() -> None:
    """Make the name known to torch's registry. Changes nothing until it is activated."""
    from torch.nn.attention import register_flash_attention_impl

    register_flash_attention_impl(IMPLEMENTATION, register_fn=_Handle)


def install() -> None:
    """Activate anyflash in torch's registry. Raises ImportError if torch is absent."""
    global _before
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

    current = current_flash_attention_impl()
    if current == IMPLEMENTATION:
        return
    target.warn_if_untested()
    register()
    _before = current
    activate_flash_attention_impl(IMPLEMENTATION)


def remove() -> None:
    """Put back torch's own attention, or the implementation that was active before."""
    global _before
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        restore_flash_attention_impl,
    )

    if current_flash_attention_impl() != IMPLEMENTATION:
        return
    restore_flash_attention_impl()
    if _before is not None:
        activate_flash_attention_impl(_before)
        _before = None


@contextmanager
def use() -> Iterator[None]:
    """`install` for the length of a `with` block. Inside an installed process it changes nothing."""
    from torch.nn.attention import current_flash_attention_impl

    outermost = current_flash_attention_impl() != IMPLEMENTATION
    install()
    try:
        yield
    finally:
        if outermost:
            remove()


def self_check() -> str | None:
    """None if a tiny nn.TransformerEncoder agrees with torch's own attention; else what is wrong."""
    if (absent := target.absent()) is not None:
        return absent
    try:
        import torch
    except ImportError as error:
        return f"cannot import torch: {error}"
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True).double()
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        causal = torch.nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
        own = layer(x, src_mask=causal)
        with use():
            ours = layer(x, src_mask=causal)
    finally:
        torch.set_rng_state(state)
    return disagreement("a tiny encoder", ours, own)
