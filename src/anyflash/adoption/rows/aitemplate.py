"""AITemplate: the graph of its BERT example, run, against transformers' BERT on the same weights."""

from __future__ import annotations

import copy
import importlib
import sys
from contextlib import nullcontext
from typing import Any

from anyflash.adapters import aitemplate as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

_LAYERS, _BYTES = 4, 256
_NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
# Where AITemplate has one layer and transformers has several of it, or another name.
_NAMES = {
    "self.qkv": ("self.query", "self.key", "self.value"),
    "self.proj": ("output.dense",),
    "output.LayerNorm": ("output.LayerNorm",),
}


def _program(config: Any, batch: int, length: int, weights: dict[str, Any]) -> Any:
    """The example's encoder as AITemplate's front end builds it, on these weights."""
    import torch

    with adapter.importable() as root:
        adapter.install()
        sys.path.insert(0, str(root.parent / "examples" / "03_bert"))
        try:
            from aitemplate.frontend import Tensor

            model = importlib.import_module("modeling.bert").BertModelEncodersOnly(
                batch_size=batch,
                seq_len=length,
                num_hidden_layers=_LAYERS,
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                hidden_act="gelu",
                layer_norm_eps=config.layer_norm_eps,
                **_NO_DROPOUT,
            )
            model.name_parameter_tensor()
            (out,) = model(Tensor(shape=[batch, length, config.hidden_size], name="x", is_input=True))
            out._attrs["name"] = "out"
            program = adapter.program(out)
            bounds = torch.arange(batch + 1, dtype=torch.int32) * length
            for name, _ in model.named_parameters():
                value = bounds if name.endswith("cu_length") else _weight(name, weights)
                program.set_constant_with_tensor(name.replace(".", "_"), value)
            return program
        finally:
            sys.path.remove(str(root.parent / "examples" / "03_bert"))
            adapter.remove()
            for module in [each for each in sys.modules if each.partition(".")[0] == "modeling"]:
                del sys.modules[module]


def _weight(name: str, weights: dict[str, Any]) -> Any:
    import torch

    before, _, kind = name.rpartition(".")
    for short, parts in _NAMES.items():
        if before.endswith(f"attention.{short}"):
            prefix = before.removesuffix(short)
            return torch.cat([weights[f"{prefix}{part}.{kind}"] for part in parts])
    return weights[name]


def _build(quick: bool) -> Workload:
    import torch
    from transformers import BertConfig, BertModel

    batch, length = (4, 256) if quick else (8, 384)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_BYTES, num_hidden_layers=_LAYERS, attn_implementation="eager", **_NO_DROPOUT
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    program = _program(config, batch, length, weights)
    text = corpus.text(batch * length).encode("ascii", "replace")
    tokens = torch.tensor(list(text)).view(batch, length)
    with torch.inference_mode():
        embedded = model.embeddings(input_ids=tokens)

    def encode(network: Any, x: Any) -> Result:
        with torch.inference_mode():
            return Result({"hidden": network(x).numpy()}, {})

    def step(role: Role) -> Result:
        if role == "ours":
            return encode(lambda x: program.run([x])[0], embedded)
        model.set_attn_implementation("eager" if role == "eager" else "sdpa")
        return encode(lambda x: model.encoder(x).last_hidden_state, embedded)

    def reference() -> Result:
        exact = copy.deepcopy(model.encoder).double()
        return encode(lambda x: exact(x).last_hidden_state, embedded.double())

    labels: dict[Role, str] = {
        "eager": "transformers, eager",
        "best": "transformers, sdpa",
        "ours": "AITemplate's graph with anyflash",
    }
    heads = config.num_attention_heads
    return Workload(
        f"BERT's encoder, {_LAYERS} layers, {heads} heads of {config.hidden_size // heads} (random), {batch} "
        f"x {length} bytes of text; AITemplate compiles for GPUs only, so transformers' model on the same "
        "weights stands beside it, as in its own claim",
        "float32",
        step,
        reference,
        tuple(Variant(role, label, nullcontext) for role, label in labels.items()),
    )


ROWS = [
    Row(
        "aitemplate-bert",
        "AITemplate",
        "BERT's encoder, its graph run",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement("transformers", "pip install 'transformers>=5,<6'"),
            Requirement("Jinja2", "pip install jinja2"),
            Requirement("sympy", "pip install sympy"),
            adapter.source,
        ),
        _build,
    )
]
