"""The mask function registered with transformers, and the tensor it returns.

transformers' own one for SDPA builds a boolean (batch, 1, q, k) matrix. Ours returns a tensor of that shape
that holds no elements: it carries the mask's formula, which our attention hands to the kernel. Any other
operation on it (a model that slices or joins its mask) builds the matrix after all, so no model can see a
difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from anyflash.adapters._torch.padding import Padding
from anyflash.adapters._torch.symbols import NotTraceable, conjunction, trace_mask
from anyflash.core.log import logger
from anyflash.semantics.expr import Expr, const, var
from anyflash.semantics.text import bind, show


class FormulaMask(torch.Tensor):
    """A boolean mask (batch, 1, q, k), True = attend, known by its formula.

    formula   a bool `Expr`; its tables hold what the pattern looks up
    build     the matrix itself, made once if at all
    """

    formula: Expr
    build: Callable[[], torch.Tensor]

    @staticmethod
    def make(
        formula: Expr, build: Callable[[], torch.Tensor], shape: Sequence[int], device: torch.device
    ) -> FormulaMask:
        mask = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            FormulaMask, tuple(shape), dtype=torch.bool, device=device
        )
        mask.formula, mask.build = formula, build
        return mask

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            mask = args[0]
            return FormulaMask.make(mask.formula, mask.build, mask.shape, mask.device)
        args, kwargs = tree_map_only(FormulaMask, lambda m: m.build(), (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"FormulaMask({_text(self.formula)!r}, shape={tuple(self.shape)})"


def only_packs(mask: FormulaMask, causal: bool, sliding_window: int | None) -> bool:
    """Does the mask say no more than causality, the window, and perhaps which packed sequence a token is of?
    Then the bounds of the sequences, if the caller gives them, say the same or more, and need no lookups."""
    if causal:
        plain = (
            sliding_window_causal_mask_function(sliding_window) if sliding_window else causal_mask_function
        )
    elif sliding_window:
        plain = sliding_window_bidirectional_mask_function(sliding_window - 1)
    else:
        plain = bidirectional_mask_function
    positions, sequences = torch.zeros(2, 1, 2, dtype=torch.long)
    packed = packed_sequence_compatibility_function(plain, positions, sequences)
    # transformers itself evaluates its mask functions for head 0.
    where = (var("batch"), const(0), var("q"), var("k"))
    texts = [_text(trace_mask(f, *where)) for f in (plain, packed)]
    return _text(mask.formula) in texts


def _text(formula: Expr) -> str:
    (bound,), _ = bind([formula])
    return show(bound)


def mask_for_transformers(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """What a model with our attention passes to its layers. The arguments are those of
    `AttentionMaskInterface`.

    A `FormulaMask`, also where SDPA's mask function gives None and leaves causality to the layer: a layer
    that has more keys than queries cannot tell an empty static cache from a continued sequence. None only if
    every query sees every key. A decoding step, whose mask is one row a batch entry, a traced call, and a
    pattern that leaves no formula get transformers' own boolean (batch, 1, q, k).
    """
    matrix = partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        device=device,
        **kwargs,
    )
    if q_length == 1 or _traced(attention_mask, q_offset):
        return matrix(
            allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip
        )
    # Built at most once; not where torch traces, which cannot make a cache.
    whole = cache(partial(matrix, allow_is_causal_skip=False, allow_is_bidirectional_skip=False))
    padding = _padding(attention_mask, kv_length, kv_offset, batch_size)
    unbounded = local_size is None or kv_length < local_size
    if allow_is_bidirectional_skip and padding is None and unbounded:
        return None
    offset = int(q_offset)
    aligned = offset - kv_offset == kv_length - q_length
    q = _shifted(var("q"), kv_offset) if aligned else _shifted(var("row"), offset)
    try:
        formula = trace_mask(mask_function, var("batch"), const(0), q, _shifted(var("k"), kv_offset))
    except NotTraceable as reason:
        logger.info("transformers mask built as a matrix: %s", reason)
        return whole()
    if padding is not None:
        formula = conjunction(formula, padding.formula())
    return FormulaMask.make(formula, whole, (batch_size, 1, q_length, kv_length), torch.device(device))


def _traced(*values: object) -> bool:
    """While torch traces, sizes and mask values must not decide anything."""
    fake = torch._subclasses.FakeTensor  # type: ignore[attr-defined]
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or any(isinstance(v, fake) for v in values)


def _shifted(index: Expr, offset: int) -> Expr:
    return index + offset if offset else index


def _padding(
    attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int, batch_size: int
) -> Padding | None:
    """The keys that exist, of the 2-D mask (batch, seen tokens); None if all do.
    Keys past its end do not exist."""
    if attention_mask is None:
        return None
    valid = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if valid.shape[-1] < kv_length:
        valid = torch.nn.functional.pad(valid, (0, kv_length - valid.shape[-1]))
    return None if bool(valid.all()) else Padding(valid.expand(batch_size, -1))
