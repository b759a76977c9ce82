"""ONNX Runtime's CPU kernels: the standard's Attention, and its own MultiHeadAttention and
GroupQueryAttention.

Each cell is a model with one attention node. Forward only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyflash.bench.cells import Cell
from anyflash.bench.inputs import Inputs, Results
from anyflash.bench.peers.base import Step
from anyflash.bench.peers.torch_sdpa import dense_mask
from anyflash.bench.variants import SOFTCAP, VARIANTS, WINDOW

_OPSETS = {"": 23, "com.microsoft": 1}
_IR_VERSION = 10
_DOMAIN = "com.microsoft"


@dataclass(slots=True)
class _Model:
    """Nodes by their inputs and outputs; arrays that are fed in, and the shape of the output."""

    feeds: dict[str, np.ndarray]
    shape: tuple[int, ...]
    nodes: list[Any] = field(default_factory=list)
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Attention:
    """Operator 23 of the standard, heads before rows."""

    name = "onnxruntime Attention"
    family = "onnxruntime"
    package = "onnxruntime"

    def lacks(self, cell: Cell) -> str | None:
        variant = VARIANTS[cell.variant]
        if variant.score is not None and not variant.additive and cell.variant != "softcap":
            return "no formula"
        return _lacks(cell, ("float32", "float16"))

    def prepare(self, inputs: Inputs) -> Step:
        from onnx import helper

        cell, variant = inputs.cell, inputs.variant
        model = _Model({name: _array(getattr(inputs, name)) for name in "qkv"}, tuple(inputs.q.shape))
        operands = ["q", "k", "v"]
        attributes: dict[str, Any] = {}
        if cell.variant == "softcap":
            attributes["softcap"] = SOFTCAP
        if variant.biases:
            model.feeds |= {name: _array(inputs.tables[name]) for name in variant.biases}
            model.nodes, mask = _added(inputs)
            operands.append(mask)
        elif variant.mask is not None or variant.additive:
            model.feeds["mask"] = _array(dense_mask(inputs))
            operands.append("mask")
        elif variant.causal:
            attributes["is_causal"] = 1
        model.nodes.append(helper.make_node("Attention", operands, ["out"], **attributes))
        return _step(model, lambda out: {"out": torch.from_numpy(out)})


class MultiHeadAttention:
    """Of its own operators: (batch, rows, heads * dim)."""

    name = "onnxruntime MultiHeadAttention"
    family = "onnxruntime"
    package = "onnxruntime"

    def lacks(self, cell: Cell) -> str | None:
        if cell.variant not in ("full", "causal"):
            return f"no {cell.variant}"
        return "no grouped heads" if cell.heads != cell.heads_kv else _lacks(cell, ("float32",))

    def prepare(self, inputs: Inputs) -> Step:
        from onnx import helper

        model = _rows_first(inputs)
        attributes = {"num_heads": inputs.cell.heads, "unidirectional": int(inputs.variant.causal)}
        node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["out"], domain=_DOMAIN, **attributes)
        model.nodes.append(node)
        return _step(model, lambda out: _heads_first(out, inputs))


class GroupQueryAttention:
    """Of its own operators: causal self-attention, (batch, rows, heads * dim); also writes a key-value
    cache."""

    name = "onnxruntime GroupQueryAttention"
    family = "onnxruntime"
    package = "onnxruntime"

    def lacks(self, cell: Cell) -> str | None:
        if cell.variant not in ("causal", "window", "softcap"):
            return f"no {cell.variant}"
        if cell.seqlen_q != cell.seqlen_k:
            return "one length for queries and keys"
        return _lacks(cell, ("float32", "float16"))

    def prepare(self, inputs: Inputs) -> Step:
        from onnx import helper

        cell = inputs.cell
        model = _rows_first(inputs)
        model.feeds["last"] = np.full(cell.batch, cell.seqlen_k - 1, np.int32)
        model.feeds["total"] = np.array(cell.seqlen_k, np.int32)
        cache = (cell.batch, cell.heads_kv, cell.seqlen_k, cell.head_dim)
        model.others = {"keys": cache, "values": cache}
        attributes: dict[str, Any] = {"num_heads": cell.heads, "kv_num_heads": cell.heads_kv}
        if cell.variant == "window":
            attributes["local_window_size"] = WINDOW
        if cell.variant == "softcap":
            attributes["softcap"] = SOFTCAP
        operands = ["q", "k", "v", "", "", "last", "total"]
        results = ["out", "keys", "values"]
        node = helper.make_node("GroupQueryAttention", operands, results, domain=_DOMAIN, **attributes)
        model.nodes.append(node)
        return _step(model, lambda out: _heads_first(out, inputs))


def _lacks(cell: Cell, dtypes: tuple[str, ...]) -> str | None:
    if cell.backward:
        return "no backward"
    if cell.lengths:
        return "no packed sequences"
    if cell.cache is not None:
        return "no KV cache here"
    if VARIANTS[cell.variant].dropout_p:
        return "no dropout"
    return None if cell.dtype in dtypes else f"no {cell.dtype}"


def _added(inputs: Inputs) -> tuple[list[Any], str]:
    """Nodes that add up the biases inside the model, and the name of the sum."""
    from onnx import helper

    first, *others = inputs.variant.biases
    nodes, name = [], first
    for other in others:
        nodes.append(helper.make_node("Add", [name, other], [f"{name}+{other}"]))
        name = f"{name}+{other}"
    return nodes, name


def _rows_first(inputs: Inputs) -> _Model:
    feeds = {name: _array(getattr(inputs, name).transpose(1, 2).flatten(2).contiguous()) for name in "qkv"}
    return _Model(feeds, feeds["q"].shape)


def _heads_first(out: np.ndarray, inputs: Inputs) -> Results:
    return {"out": torch.from_numpy(out).unflatten(2, (inputs.cell.heads, -1)).transpose(1, 2)}


def _array(x: Tensor) -> np.ndarray:
    return x.detach().numpy()


def _step(model: _Model, results: Any) -> Step:
    import onnxruntime
    from onnx import helper

    def info(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    made = helper.make_model(
        helper.make_graph(
            model.nodes,
            "attention",
            [info(name, array.dtype, array.shape) for name, array in model.feeds.items()],
            [info(n, model.feeds["q"].dtype, s) for n, s in {"out": model.shape, **model.others}.items()],
        ),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()],
        ir_version=_IR_VERSION,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Step(lambda: session.run(["out"], model.feeds), lambda outs: results(outs[0]))


PEERS = (Attention(), MultiHeadAttention(), GroupQueryAttention())
