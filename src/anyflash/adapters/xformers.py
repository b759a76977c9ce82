"""xformers: `memory_efficient_attention` on the CPU, where xformers has no operator.

    from anyflash.adapters import xformers as anyflash_for_xformers

    anyflash_for_xformers.install()
    out = xformers.ops.memory_efficient_attention(q, k, v, attn_bias=...)

`install` adds our operators, behind xformers' own, to those that `op=None` chooses from. Without it they can
be asked for, as `op=anyflash_for_xformers.operators()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyflash.adapters.base import Target, disagreement

name = "xformers"
target = Target(
    package="xformers",
    module="xformers",
    minimum="0.0.35",
    below="0.0.36",
    how_to_install="pip install --no-deps 'xformers>=0.0.35,<0.0.36'",
)

_undo: list[Callable[[], object]] = []


def operators() -> tuple[Any, Any]:
    """(forward, backward), for the `op` argument. Raises ImportError if xformers or torch is absent."""
    from anyflash.adapters._xformers.operators import BwOp, FwOp

    return FwOp, BwOp


def install() -> None:
    """Let `op=None` find our operators. Raises ImportError if xformers or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from xformers.ops import fmha
    from xformers.ops.fmha import dispatch

    forward, backward = operators()
    own_forward, own_backward = dispatch._dispatch_fw_priority_list, dispatch._dispatch_bw

    def priorities(inp: Any, needs_gradient: bool) -> list[Any]:
        return [*own_forward(inp, needs_gradient), forward]

    def dispatch_backward(inp: Any, varlen_lse_packed: bool | None) -> Any:
        ours = inp.query.device.type in backward.SUPPORTED_DEVICES and varlen_lse_packed is not False
        if ours and not backward.not_supported_reasons(inp):
            return backward
        return own_backward(inp, varlen_lse_packed)

    dispatch._dispatch_fw_priority_list = priorities
    dispatch._dispatch_bw = fmha._dispatch_bw = dispatch_backward

    def undo() -> None:
        dispatch._dispatch_fw_priority_list = own_forward
        dispatch._dispatch_bw = fmha._dispatch_bw = own_backward

    _undo.append(undo)


def remove() -> None:
    """Leave `op=None` to xformers' own operators."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if packed causal attention and its gradients agree with the scores formed; else what is wrong."""
    if (absent := target.absent()) is not None:
        return absent
    was_installed = bool(_undo)
    try:
        import torch
        from xformers.ops import fmha

        install()
    except ImportError as error:
        return target.unusable(error)
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 9, 2, 8, dtype=torch.float64, generator=generator).requires_grad_()
        bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens([4, 5])
        ours = fmha.memory_efficient_attention(x, x, x, attn_bias=bias)
        mask = bias.materialize((9, 9), dtype=torch.float64)
        scores = torch.einsum("bqhd,bkhd->bhqk", x, x) * 8**-0.5 + mask
        own = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), x)
        for what, mine, wanted in (
            ("attention", ours, own),
            ("gradient", *(torch.autograd.grad(o.square().sum(), x)[0] for o in (ours, own))),
        ):
            wrong = disagreement(f"packed {what}", mine, wanted, 256)
            if wrong is not None:
                return wrong
        return None
    finally:
        if not was_installed:
            remove()
