"""AITemplate's operators on torch tensors, by the name that a graph has for them.

Each takes the operator's attributes and its inputs, and gives its outputs. Attention is `anyflash.attention`;
the rest is torch's. Names that spell out what happens (`gemm_rcr_bias_add_relu`, `bmm_ccr_add`) are read from
left to right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from anyflash import api
from anyflash.core.errors import Unsupported
from anyflash.semantics.mask import Mask, upper_left

Attributes = Mapping[str, Any]

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "fastgelu": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "swish": functional.silu,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
}
_BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
}
_GEMM = re.compile(r"gemm_r([cr])r((?:_[a-z]+)*?)(_permute)?(_m2n3)?")
_BMM = re.compile(r"bmm_([cr])([cr])([cr])(_add)?(_permute)?")


def find(name: str) -> Callable[..., Any] | None:
    """The operator of this name; None if there is none here."""
    if name in _NAMED:
        return _NAMED[name]
    name = name.replace("fast_gelu", "fastgelu")
    gemm, bmm = _GEMM.fullmatch(name), _BMM.fullmatch(name)
    if gemm:
        then = gemm[2].split("_")[1:]
        known = all(each in ("bias", *_UNARY, *_BINARY) for each in then)
        return _gemm(gemm[1] == "c", then, bool(gemm[3])) if known else None
    if bmm:
        return _bmm(bmm[1] == "c", bmm[2] == "c", bmm[3] == "c", bool(bmm[4]), bool(bmm[5]))
    if re.fullmatch(r"permute\d+", name):
        axes = [int(digit) for digit in name.removeprefix("permute")]
        return lambda attributes, x: x.permute(axes)
    return None


def product(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, attributes: Attributes | None = None
) -> Tensor:
    """(entries, rows, dim) each, as AITemplate's batched products have it; with the attributes of an operator
    that permutes, (batch, rows, heads, dim)."""
    out = api.attention(
        *(t[:, None] for t in (q, k, v)),
        layout="bhsd",
        scale=scale,
        mask=upper_left() if causal else None,
    )
    return out[:, 0] if attributes is None else _heads_last(attributes, out[:, 0])


def _heads_last(attributes: Attributes, x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, attributes["shape"][0])).transpose(1, 2)


def _gemm(columns: bool, then: list[str], permute: bool) -> Callable[..., Tensor]:
    """a (..., m, k) by b, (n, k) if it lies in columns; then biases, functions and further operands."""

    def run(attributes: Attributes, a: Tensor, b: Tensor, *operands: Tensor) -> Tensor:
        left = list(operands)
        bias = left.pop(0) if "bias" in then else None
        out = functional.linear(a, b if columns else b.mT, bias)
        for what in then:
            if what in _BINARY:
                # The same elements, whatever axes a graph has given them.
                other = left.pop(0)
                out = _BINARY[what](out, other.view(out.shape) if other.numel() == out.numel() else other)
            elif what != "bias":
                out = _UNARY[what](out)
        return _permuted(attributes, out) if permute else out

    return run


def _permuted(attributes: Attributes, out: Tensor) -> Tensor:
    """(m, n) taken apart by the operator's shape, and its axes in the order that its layout says."""
    out = out.flatten(0, -2)
    first, *others = attributes["shape"]
    apart = out.unflatten(0, (-1, first)).unflatten(-1, (*others, -1))
    return apart.permute((0, 2, 1, 3) if apart.ndim == 4 else (2, 0, 3, 1, 4))


def _bmm(
    a_columns: bool, b_columns: bool, out_columns: bool, add: bool, permute: bool
) -> Callable[..., Tensor]:
    def run(attributes: Attributes, a: Tensor, b: Tensor, *operands: Tensor) -> Tensor:
        out = (a.mT if a_columns else a) @ (b.mT if b_columns else b)
        out = out.mT if out_columns else out
        out = out + operands[0] if add else out
        return _heads_last(attributes, out) if permute else out

    return run


def _flash_attention(attributes: Attributes, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    """qkv (total, 3, heads, dim), sequences packed."""
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    return api.attention_varlen(*qkv.unbind(1), causal=attributes["causal"], **bounds)


def _mem_eff_attention(attributes: Attributes, q: Tensor, k: Tensor, v: Tensor, *lengths: Tensor) -> Tensor:
    """(batch, heads, rows, dim) to (batch, rows, heads, dim), causal upper-left; lengths (batch,) of keys,
    then of rows: those past them are 0."""
    left = list(lengths)
    mask = upper_left() if attributes["causal"] else None
    for axis, given in (("k", "variable_seq_length_kv"), ("row", "variable_seq_length_q")):
        if attributes[given]:
            used = api.table(left.pop(0))
            inside = Mask(lambda at, axis=axis, used=used: getattr(at, axis) < used[at.batch])
            mask = inside if mask is None else mask & inside
    return api.attention(q, k, v, layout="bhsd", mask=mask).transpose(1, 2)


def _bmm_softmax_bmm(attributes: Attributes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    name = attributes["op"]
    permute = attributes if "_permute" in name else None
    return product(q, k, v, attributes["scale"], name.endswith("_causal"), permute)


def _elementwise(attributes: Attributes, *tensors: Tensor) -> Tensor:
    """Numbers among the operands are no inputs of the operator; where they stand, its `args` say."""
    left = list(tensors)
    numbers = [each._attrs["value"] for each in attributes["args"]]
    operands = [left.pop(0) if number is None else number for number in numbers]
    functions: Mapping[str, Callable[..., Tensor]] = _UNARY if len(operands) == 1 else _BINARY
    name = attributes["func"].name.lower()
    if name not in functions:
        raise Unsupported("this graph of AITemplate's", {"anyflash": [f"no elementwise {name}"]})
    return functions[name](*operands)


def _layernorm(attributes: Attributes, x: Tensor, *affine: Tensor) -> Tensor:
    left = list(affine)
    weight = left.pop(0) if attributes["gamma_constant"] is None else None
    bias = left.pop(0) if attributes["beta_constant"] is None else None
    shape = [dim.value() for dim in attributes["normalized_shape"]]
    return functional.layer_norm(x, shape, weight, bias, attributes["eps"])


def _bert_embeddings(
    attributes: Attributes,
    ids: Tensor,
    types: Tensor,
    positions: Tensor,
    words: Tensor,
    of_types: Tensor,
    of_positions: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    x = words[ids] + of_types[types] + of_positions[positions]
    return functional.layer_norm(x, x.shape[-1:], weight, bias, attributes["eps"])


def _slice(attributes: Attributes, x: Tensor) -> Tensor:
    bounds = zip(attributes["start_indices"], attributes["end_indices"], strict=True)
    return x[tuple(slice(start, end) for start, end in bounds)]


_NAMED: dict[str, Callable[..., Any]] = {
    "flash_attention": _flash_attention,
    "mem_eff_attention": _mem_eff_attention,
    "bmm_softmax_bmm": _bmm_softmax_bmm,
    "bmm_softmax_bmm_permute": _bmm_softmax_bmm,
    "bmm_softmax_bmm_permute_causal": _bmm_softmax_bmm,
    "elementwise": _elementwise,
    "softmax": lambda attributes, x: x.softmax(attributes["dim"]),
    "layernorm": _layernorm,
    "bert_embeddings": _bert_embeddings,
    "split": lambda attributes, x: x.split(attributes["split_sizes"], attributes["split_dim"]),
    "permute": lambda attributes, x: x.permute(attributes["dims"]),
    "dynamic_slice": _slice,
    "concatenate": lambda attributes, *parts: torch.cat(parts, attributes["concat_dim"]),
}


def reshape(x: Tensor, shape: list[int | None]) -> Tensor:
    """To a shape of which one extent may be unknown."""
    known = math.prod(extent for extent in shape if extent is not None)
    unknown = x.numel() // known if known else 0
    return x.reshape([unknown if extent is None else extent for extent in shape])
