"""Megatron-LM: a training step of its GPT on bytes of real text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyflash.adapters import megatron as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

_WIDTH, _HEADS, _LAYERS, _VOCABULARY = 512, 8, 2, 256


@contextmanager
def _attention(role: Role) -> Iterator[None]:
    """Ours by the adapter; the best there is without us by a forward that calls torch's attention.

    Megatron's own asks CUDA for its device, and makes its mask there: meanwhile both are the CPU's.
    """
    import torch
    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    own, mask = DotProductAttention.forward, fused_softmax.get_default_causal_mask
    device = torch.cuda.current_device
    fused_softmax.get_default_causal_mask = _causal_mask
    torch.cuda.current_device = lambda: "cpu"
    if role == "ours":
        adapter.install()
    elif role == "best":
        DotProductAttention.forward = _by_torch
    try:
        yield
    finally:
        adapter.remove()
        DotProductAttention.forward = own
        fused_softmax.get_default_causal_mask = mask
        torch.cuda.current_device = device


def _causal_mask(rows: int) -> Any:
    """True = masked."""
    import torch

    return torch.ones(rows, rows, dtype=torch.bool).triu(1)


def _by_torch(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
    return out.permute(2, 0, 1, 3).flatten(2)


def _model(length: int) -> Any:
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
        )
        parallel_state.initialize_model_parallel(1)
        initialize_rng_tracker(inference_rng_tracker=True)
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=_LAYERS,
        hidden_size=_WIDTH,
        num_attention_heads=_HEADS,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return GPTModel(config, get_gpt_layer_local_spec(), _VOCABULARY, length)


def _build(quick: bool) -> Workload:
    import torch

    length = 512 if quick else 2048
    text = corpus.text(length + 1).encode("ascii", "replace")
    ids = torch.tensor(list(text), dtype=torch.long)[None]
    positions = torch.arange(length)[None]
    model = _model(length)

    def train(network: Any) -> Result:
        network.zero_grad(set_to_none=True)
        losses = network(ids[:, :-1], positions, None, labels=ids[:, 1:])
        losses.mean().backward()
        return Result(
            {"losses": losses.detach().numpy()},
            {name: p.grad.numpy() for name, p in network.named_parameters()},
        )

    def reference() -> Result:
        with _attention("eager"):
            return train(_model(length).double())

    parameters = sum(p.numel() for p in model.parameters())
    labels: dict[Role, str] = {
        "eager": "Megatron local",
        "best": "torch's SDPA put there",
        "ours": "anyflash",
    }
    return Workload(
        f"GPTModel, {_LAYERS} layers, {parameters / 1e6:.1f} M parameters (random), {_HEADS} heads of "
        f"{_WIDTH // _HEADS}, causal, {length} bytes of text: forward, loss and backward; Megatron's own "
        "attention is for CUDA, so its device and mask are made the CPU's for it",
        "float32",
        lambda role: train(model),
        reference,
        tuple(Variant(role, label, partial(_attention, role)) for role, label in labels.items()),
    )


ROWS = [
    Row(
        "megatron-gpt-step",
        "Megatron-LM",
        "GPT training step",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement("megatron-core", adapter.target.how_to_install),
        ),
        _build,
    )
]
