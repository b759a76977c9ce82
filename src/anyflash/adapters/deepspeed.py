"""DeepSpeed: its attention for proteins, and that of its inference layers, on the CPU.

    from anyflash.adapters import deepspeed as anyflash_for_deepspeed

    anyflash_for_deepspeed.install()
    DS4Sci_EvoformerAttention(q, k, v, [mask, pair_bias])

`install` gives `DS4Sci_EvoformerAttention` a kernel, with gradients of both biases, for any length and width.
It also lets layers with DeepSpeed's injected kernels run where those cannot be compiled, with our attention;
that concerns layers that are made afterwards.

Sequence parallelism (Ulysses) needs no adapter: `DistributedAttention` takes `anyflash.attention`, and
`UlyssesSPAttentionHF` the name that the adapter for transformers registers, "AnyFlash". See docs/systems.md.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from anyflash.adapters.base import Target, disagreement

name = "deepspeed"
target = Target(
    package="deepspeed",
    module="deepspeed",
    minimum="0.19",
    below="0.20",
    how_to_install="DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed>=0.19,<0.20'",
)

_undo: list[Callable[[], object]] = []


def install() -> None:
    """Put our kernels in place. Raises ImportError if DeepSpeed or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    import deepspeed.ops.deepspeed4science.evoformer_attn as theirs
    from deepspeed.ops.transformer.inference.op_binding.base import BaseOp
    from deepspeed.ops.transformer.inference.op_binding.softmax_context import SoftmaxContextOp

    from anyflash.adapters._deepspeed import evoformer, inference

    kernels = theirs._attention, theirs.attention_bwd
    theirs._attention, theirs.attention_bwd = evoformer.attention, evoformer.attention_bwd
    module, fallback = BaseOp.inference_module, SoftmaxContextOp.softmax_context_fallback
    if module is None and not _has_compiled():
        # An object without operators: DeepSpeed then takes its own functions in torch, and this one of ours.
        BaseOp.inference_module = SimpleNamespace()
    SoftmaxContextOp.softmax_context_fallback = inference.context_function(fallback)

    def undo() -> None:
        theirs._attention, theirs.attention_bwd = kernels
        SoftmaxContextOp.softmax_context_fallback = fallback
        BaseOp.inference_module = module

    _undo.append(undo)


def remove() -> None:
    """Put DeepSpeed's own back. Inference layers that were made meanwhile keep what they have."""
    while _undo:
        _undo.pop()()


def _has_compiled() -> bool:
    """Can DeepSpeed compile its inference operators for the device that is here?"""
    from deepspeed.ops.op_builder import InferenceBuilder
    from deepspeed.ops.op_builder.cpu import NotImplementedBuilder

    return InferenceBuilder is not NotImplementedBuilder


def self_check() -> str | None:
    """None if attention with two biases and its gradients are those of the definition; else what is wrong."""
    if (absent := target.absent()) is not None:
        return absent
    was_installed = bool(_undo)
    try:
        import torch
        from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention

        install()
    except ImportError as error:
        return target.unusable(error)
    try:
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, 2, 9, 2, 8), (1, 2, 1, 1, 9), (1, 1, 2, 9, 9))
        x, mask, pair = (
            torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes
        )
        ours = DS4Sci_EvoformerAttention(x, x, x, [mask, pair])
        scores = torch.einsum("bnqhd,bnkhd->bnhqk", x, x) * 8**-0.5 + mask + pair
        own = torch.einsum("bnhqk,bnkhd->bnqhd", scores.softmax(-1), x)
        gradients = (torch.autograd.grad(o.square().sum(), (x, mask, pair)) for o in (ours, own))
        for mine, wanted in zip((ours, *next(gradients)), (own, *next(gradients)), strict=True):
            wrong = disagreement("attention with two biases", mine, wanted, 256)
            if wrong is not None:
                return wrong
        return None
    finally:
        if not was_installed:
            remove()
