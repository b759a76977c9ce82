"""Kernl's idea, attention rewritten in a model's graph: BERT, which its own patterns reach no more."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from anyflash.adapters import kernl as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

_LAYERS, _BYTES = 4, 256


@contextmanager
def _attention(model: Any, role: Role) -> Iterator[None]:
    model.set_attn_implementation("sdpa" if role == "best" else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


def _build(quick: bool) -> Workload:
    import torch
    from transformers import BertConfig, BertModel

    batch, longest = (4, 256) if quick else (8, 512)
    # Bytes of text, each entry some words shorter than the one before, as a batch sorted by length is.
    texts = sorted(corpus.passages(batch, longest // 16, longest // 4), key=len)[::-1]
    lines = [text.encode("ascii", "replace")[:longest] for text in texts]
    tokens = torch.zeros(batch, longest, dtype=torch.long)
    present = torch.zeros_like(tokens)
    for i, line in enumerate(lines):
        tokens[i, : len(line)] = torch.tensor(list(line))
        present[i, : len(line)] = 1
    torch.manual_seed(0)
    config = BertConfig(vocab_size=_BYTES, num_hidden_layers=_LAYERS, attn_implementation="eager")
    model = BertModel(config, add_pooling_layer=False).eval()
    compiled = torch.compile(model, backend=adapter.backend)

    def encode(network: Any) -> Result:
        with torch.inference_mode():
            hidden = network(input_ids=tokens, attention_mask=present).last_hidden_state
        return Result({"hidden": np.asarray(hidden[present.bool()])}, {})

    labels: dict[Role, str] = {"eager": "eager", "best": "sdpa", "ours": "graph rewritten with anyflash"}
    heads = config.num_attention_heads
    return Workload(
        f"BERT, {_LAYERS} layers, {heads} heads of {config.hidden_size // heads} (random), {batch} texts of "
        f"{min(map(len, lines))} to {max(map(len, lines))} bytes in a padded batch; Kernl's own patterns "
        "find no attention in this version of transformers, and its kernels are for CUDA",
        "float32",
        lambda role: encode(compiled if role == "ours" else model),
        lambda: encode(copy.deepcopy(model).double()),
        tuple(Variant(role, label, partial(_attention, model, role)) for role, label in labels.items()),
    )


ROWS = [
    Row(
        "kernl-bert",
        "Kernl",
        "BERT, attention rewritten in its graph",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement("transformers", "pip install 'transformers>=5,<6'"),
        ),
        _build,
    )
]
