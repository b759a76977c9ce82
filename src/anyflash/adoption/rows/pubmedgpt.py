"""PubMedGPT (BioMedLM): a training step of its GPT at its width, and the loss of a narrower one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from anyflash.adapters import transformers as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

# Those that were published, of 32 layers; heads of 128.
_WIDTH, _HEADS, _VOCABULARY, _LENGTH = 2560, 20, 28896, 1024
_IMPLEMENTATIONS: dict[Role, str] = {"eager": "eager", "best": "sdpa", "ours": adapter.IMPLEMENTATION}


@contextmanager
def _attention(model: Any, role: Role) -> Iterator[None]:
    adapter.install()
    model.set_attn_implementation(_IMPLEMENTATIONS[role])
    try:
        yield
    finally:
        model.set_attn_implementation("eager")
        adapter.remove()


def _model(heads: int, layers: int, length: int) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_embd=heads * _WIDTH // _HEADS,
        n_head=heads,
        n_layer=layers,
        n_positions=length,
        bos_token_id=_VOCABULARY - 1,
        eos_token_id=_VOCABULARY - 1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config).train()


@cache
def _tokens(characters: int) -> list[int]:
    """By byte pairs learned from the text itself, as its tokenizer was from its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = corpus.text(characters)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer.encode(text).ids


def _build(quick: bool) -> Workload:
    import torch

    length = _LENGTH // 4 if quick else _LENGTH
    ids = torch.tensor([_tokens(400_000)[:length]])
    heads = _HEADS // 4 if quick else _HEADS
    model = _model(heads, 1, _LENGTH)

    def train(network: Any) -> Result:
        network.zero_grad(set_to_none=True)
        out = network(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        return Result(
            {"logits": out.logits.detach().numpy()},
            {name: p.grad.numpy() for name, p in network.named_parameters()},
        )

    def reference() -> Result:
        # Under SDPA: transformers' eager attention takes its softmax in float32.
        exact = copy.deepcopy(model).double()
        exact.set_attn_implementation("sdpa")
        return train(exact)

    narrow = _model(4, 2, 256)
    first = copy.deepcopy(narrow.state_dict())

    def curve(role: Role, steps: int) -> list[float]:
        narrow.load_state_dict(first)
        optimizer = torch.optim.AdamW(narrow.parameters(), lr=6e-4)
        text, losses = torch.tensor(_tokens(400_000)), []
        with _attention(narrow, role):
            for step in range(steps):
                part = text[256 * step : 256 * (step + 1)][None]
                loss = narrow(input_ids=part, labels=part, use_cache=False).loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    parameters = sum(p.numel() for p in model.parameters())
    labels: dict[Role, str] = {"eager": "eager", "best": "sdpa", "ours": "anyflash"}
    return Workload(
        f"PubMedGPT's GPT-2 with {heads} of its {_HEADS} heads of {_WIDTH // _HEADS}, its vocabulary, 1 of "
        f"its 32 layers, {parameters / 1e6:.0f} M parameters (random), {ids.shape[1]} tokens of text: "
        "forward, loss and backward. At this width nearly all of the work is in the linear layers. "
        "The curve: 4 heads of 128, 2 layers, 256 tokens a step, AdamW",
        "float32",
        lambda role: train(model),
        reference,
        tuple(Variant(role, label, partial(_attention, model, role)) for role, label in labels.items()),
        curve,
    )


ROWS = [
    Row(
        "pubmedgpt-step",
        "PubMedGPT",
        "GPT training step at its width",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement("transformers", adapter.target.how_to_install),
        ),
        _build,
    )
]
