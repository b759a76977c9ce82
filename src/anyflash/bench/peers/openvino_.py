"""OpenVINO's CPU plugin: a model with one ScaledDotProductAttention. Forward only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyflash.bench.cells import Cell
from anyflash.bench.inputs import Inputs, Results
from anyflash.bench.peers.base import Step
from anyflash.bench.peers.torch_sdpa import dense_mask
from anyflash.bench.variants import VARIANTS

_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# What the plugin calls the dtypes it computes in.
_CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


class OpenVino:
    name = "openvino"
    family = "openvino"
    package = "openvino"

    def lacks(self, cell: Cell) -> str | None:
        variant = VARIANTS[cell.variant]
        if cell.backward:
            return "no backward"
        if cell.lengths:
            return "no packed sequences"
        if cell.cache is not None:
            return "no KV cache here"
        if variant.dropout_p:
            return "no dropout"
        if variant.score is not None and not variant.additive:
            return "no formula"
        return None if cell.dtype in _TYPES else f"no {cell.dtype}"

    def prepare(self, inputs: Inputs) -> Step:
        import openvino as ov
        from openvino import opset13 as ops

        cell, variant = inputs.cell, inputs.variant
        arrays = {name: getattr(inputs, name) for name in "qkv"} | {
            n: inputs.tables[n] for n in variant.biases
        }
        if variant.mask is not None or variant.additive:
            arrays["mask"] = dense_mask(inputs)
        parameters = {name: ops.parameter(list(x.shape), _type(ov, x.dtype)) for name, x in arrays.items()}
        nodes: list[Any] = [parameters["q"], *(_grouped(ops, parameters[n], cell) for n in "kv")]
        extra = [parameters[name] for name in (*variant.biases, "mask") if name in parameters]
        if extra:
            added = extra[0]
            for other in extra[1:]:
                added = ops.add(added, other)
            nodes.append(added)
        attend = ops.scaled_dot_product_attention(*nodes, causal=variant.causal and not extra)
        core = ov.Core()
        computes = _CAPABILITIES[cell.dtype] in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        compiled = core.compile_model(
            ov.Model([attend], list(parameters.values())),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
                "INFERENCE_PRECISION_HINT": _TYPES[cell.dtype] if computes else "f32",
            },
        )
        request = compiled.create_infer_request()
        # The request does not keep the memory of its inputs alive.
        kept = [x.detach().contiguous() for x in arrays.values()]
        for i, x in enumerate(kept):
            request.set_input_tensor(i, _tensor(ov, x))

        def infer() -> list[Tensor]:
            request.infer()
            return kept

        return Step(infer, lambda _: _results(request.get_output_tensor(0).data, inputs))


def _type(ov: Any, dtype: torch.dtype) -> Any:
    return (
        ov.Type.boolean
        if dtype is torch.bool
        else getattr(ov.Type, _TYPES[str(dtype).removeprefix("torch.")])
    )


def _tensor(ov: Any, x: Tensor) -> Any:
    if x.dtype is torch.bfloat16:
        return ov.Tensor(x.view(torch.uint16).numpy(), list(x.shape), ov.Type.bf16)
    return ov.Tensor(x.numpy(), shared_memory=True)


def _grouped(ops: Any, x: Any, cell: Cell) -> Any:
    """Key heads repeated for their query heads as exported models do it: a broadcast, which need not copy."""
    group = cell.heads // cell.heads_kv
    if group == 1:
        return x
    wide = [cell.batch, cell.heads_kv, group, cell.seqlen_k, cell.head_dim]
    whole = [cell.batch, cell.heads, cell.seqlen_k, cell.head_dim]
    return ops.reshape(ops.broadcast(ops.unsqueeze(x, 2), np.array(wide)), np.array(whole), False)


def _results(out: np.ndarray, inputs: Inputs) -> Results:
    if inputs.q.dtype is torch.bfloat16 and out.dtype.itemsize == 2:
        return {"out": torch.from_numpy(out.view(np.uint16).copy()).view(torch.bfloat16)}
    return {"out": torch.from_numpy(out.copy()).to(inputs.q.dtype)}


PEERS = (OpenVino(),)
