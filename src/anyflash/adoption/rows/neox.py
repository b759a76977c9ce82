"""GPT-NeoX: a training step of its GPT on real text. NeoX is written for GPUs; here one process and its CPU
are its whole machine."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from anyflash.adapters import neox as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

_WIDTH, _HEADS, _LAYERS, _VOCABULARY = 768, 12, 2, 256
# What a row has opened: the process measures that row alone, so it stays open until its end.
_open = contextlib.ExitStack()
atexit.register(_open.close)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Within: NeoX's modules can be imported, from its checkout, and used without a GPU or its launcher."""
    import torch

    group = torch.distributed
    alone = not group.is_initialized()
    if alone:
        group.init_process_group("gloo", rank=0, world_size=1, store=group.HashStore())
    try:
        with adapter.importable():
            mpu = importlib.import_module("megatron.mpu")
            mpu.initialize_model_parallel(1)
            random = SimpleNamespace(fork=contextlib.nullcontext)
            with (
                mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
                mock.patch.object(mpu, "get_cuda_rng_tracker", return_value=random),
            ):
                yield
    finally:
        if alone:
            group.destroy_process_group()


def settings(**chosen: Any) -> SimpleNamespace:
    """NeoX's arguments: its defaults, and those given. Its own class would want its tokenizers."""
    import torch

    described = vars(importlib.import_module("megatron.neox_arguments.neox_args")).values()
    defaults = {
        field.name: field.default
        for kind in described
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind)
    }
    derived = {"params_dtype": torch.float32, "precision": "fp32", "use_cpu_initialization": True}
    return SimpleNamespace(**{**defaults, **derived, **chosen})


def model(arguments: SimpleNamespace) -> Any:
    """NeoX's GPT as it trains without pipelines: called with (tokens, positions, mask), gives logits."""
    import torch
    from deepspeed.pipe import PipelineModule

    def without_stages(self: Any, **given: Any) -> None:
        torch.nn.Module.__init__(self)
        self.activation_checkpoint_interval = given["activation_checkpoint_interval"]
        self.activation_checkpoint_func = None

    gpt = importlib.import_module("megatron.model.gpt2_model").GPT2ModelPipe
    torch.manual_seed(0)
    with mock.patch.object(PipelineModule, "__init__", without_stages):
        return gpt(arguments).to_sequential()


@contextmanager
def _attention(network: Any, role: Role) -> Iterator[None]:
    """The best there is without us is torch's attention in the place of flash_attn's."""
    if role != "best":
        yield
        return
    layers = [m for m in network.modules() if hasattr(m, "flash_qkv_fn")]
    own = [layer.flash_qkv_fn for layer in layers]
    for layer in layers:
        layer.flash_qkv_fn = _by_torch
    try:
        yield
    finally:
        for layer, function in zip(layers, own, strict=True):
            layer.flash_qkv_fn = function


def _by_torch(q: Any, k: Any, v: Any, dropout_p: float, softmax_scale: float | None, causal: bool) -> Any:
    import torch

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale
    )
    return out.transpose(1, 2)


def _build(quick: bool) -> Workload:
    import torch

    _open.enter_context(on_the_cpu())
    adapter.install()
    length = 512 if quick else 2048
    text = corpus.text(length + 1).encode("ascii", "replace")
    ids = torch.tensor(list(text), dtype=torch.long)[None]
    positions = torch.arange(length)[None]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    shape = {
        "hidden_size": _WIDTH,
        "num_attention_heads": _HEADS,
        "num_layers": _LAYERS,
        "seq_length": length,
        "max_position_embeddings": length,
        "padded_vocab_size": _VOCABULARY,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
    }

    def build(kind: str) -> Any:
        return model(settings(attention_config=[kind] * _LAYERS, **shape))

    networks = {kind: build(kind) for kind in ("global", "flash")}
    networks["flash"].load_state_dict(networks["global"].state_dict())

    def train(network: Any) -> Result:
        network.zero_grad(set_to_none=True)
        logits = network((ids[:, :-1], positions, mask))
        torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).backward()
        return Result(
            {"logits": logits.detach().numpy()},
            {name: p.grad.numpy() for name, p in network.named_parameters()},
        )

    def reference() -> Result:
        # Built anew: its last layer holds on to the embedding that it was built with, past any copy.
        exact = build("global")
        exact.load_state_dict(networks["global"].state_dict())
        return train(exact.double())

    parameters = sum(p.numel() for p in networks["flash"].parameters())
    labels: dict[Role, str] = {
        "eager": "NeoX's global attention",
        "best": "torch's SDPA as flash_attn",
        "ours": "anyflash as flash_attn",
    }
    return Workload(
        f"GPT2ModelPipe as a sequence of layers, {_LAYERS} of them, {parameters / 1e6:.1f} M parameters "
        f"(random), {_HEADS} heads of {_WIDTH // _HEADS}, rotary over a quarter, causal, {length} bytes of "
        "text: forward, loss and backward; NeoX asks for CUDA's device, which is the CPU's here",
        "float32",
        lambda role: train(networks["global" if role == "eager" else "flash"]),
        reference,
        tuple(
            Variant(role, label, partial(_attention, networks["flash"], role))
            for role, label in labels.items()
        ),
    )


ROWS = [
    Row(
        "neox-gpt-step",
        "GPT-NeoX",
        "GPT training step",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement(
                "deepspeed", "DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed>=0.19,<0.20'"
            ),
            adapter.source,
        ),
        _build,
    )
]
