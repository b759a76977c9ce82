"""llm-foundry: a training step of MPT with ALiBi on bytes of real text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyflash.adapters import llm_foundry as adapter
from anyflash.adapters._composer import importing
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

# MPT-125M's width and heads.
_WIDTH, _HEADS, _LAYERS, _VOCABULARY = 768, 12, 2, 256


@contextmanager
def _attention(model: Any, role: Role) -> Iterator[None]:
    """The function of this role in the model's layers, which hold what was registered as they were made."""
    from llmfoundry.layers_registry import attention_implementations

    layers = [block.attn for block in model.transformer.blocks]
    own = layers[0].attn_fn
    if role == "ours":
        adapter.install()
    function = _by_torch if role == "best" else attention_implementations.get("torch")
    try:
        for layer in layers:
            layer.attn_fn = function
        yield
    finally:
        for layer in layers:
            layer.attn_fn = own
        adapter.remove()


def _by_torch(
    query: Any, key: Any, value: Any, n_heads: int, kv_n_heads: int, *, attn_bias: Any, **given: Any
) -> tuple[Any, None, None]:
    """torch's attention; a bias and the triangle go into one matrix, as it takes no other."""
    import torch

    q, k, v = (t.unflatten(-1, (n_heads, -1)).transpose(1, 2) for t in (query, key, value))
    rows = q.shape[2]
    triangle = torch.full((rows, rows), float("-inf"), dtype=q.dtype).triu(1)
    mask = attn_bias[..., -rows:].to(q.dtype) + triangle
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=given["softmax_scale"])
    return out.transpose(1, 2).flatten(2), None, None


def _model(length: int) -> Any:
    import torch

    importing.llm_foundry()
    from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM

    torch.manual_seed(0)
    config = MPTConfig(
        d_model=_WIDTH,
        n_heads=_HEADS,
        n_layers=_LAYERS,
        vocab_size=_VOCABULARY,
        max_seq_len=length,
        learned_pos_emb=False,
        attn_config={"attn_impl": "torch", "alibi": True},
        init_config={"name": "kaiming_normal_"},
        norm_type="layernorm",
        # transformers 5 no longer gives configurations one.
        pad_token_id=None,
    )
    return MPTForCausalLM(config).train()


def _build(quick: bool) -> Workload:
    import torch

    length = 512 if quick else 2048
    ids = torch.tensor(list(corpus.text(length + 1).encode("ascii", "replace")))[None]
    model = _model(length)

    def train(network: Any) -> Result:
        network.zero_grad(set_to_none=True)
        logits = network(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[0, 1:])
        loss.backward()
        return Result(
            {"logits": logits.detach().numpy()},
            {name: p.grad.numpy() for name, p in network.named_parameters() if p.grad is not None},
        )

    parameters = sum(p.numel() for p in model.parameters())
    labels: dict[Role, str] = {
        "eager": "llm-foundry's torch",
        "best": "torch's SDPA put there",
        "ours": "anyflash",
    }
    return Workload(
        f"MPT-125M's layers, {_LAYERS} of 12, {parameters / 1e6:.1f} M parameters (random), {_HEADS} heads "
        f"of {_WIDTH // _HEADS}, ALiBi, causal, {length} bytes of text: forward, loss and backward; "
        "llm-foundry's flash attention needs CUDA, so torch's is put there, which takes ALiBi as a matrix",
        "float32",
        lambda role: train(model),
        lambda: train(_model(length).double()),
        tuple(Variant(role, label, partial(_attention, model, role)) for role, label in labels.items()),
    )


ROWS = [
    Row(
        "llm-foundry-mpt-step",
        "llm-foundry",
        "MPT training step with ALiBi",
        (
            Requirement("llm-foundry", importing.LLM_FOUNDRY),
            Requirement("mosaicml", importing.COMPOSER),
        ),
        _build,
    )
]
