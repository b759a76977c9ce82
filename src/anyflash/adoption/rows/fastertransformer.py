"""FasterTransformer: a prompt and tokens by its GPT decoders, against transformers' GPT-2 on the weights."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

from anyflash.adapters import fastertransformer as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

_LAYERS, _BYTES = 4, 256
_PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def _decoders(model: Any) -> tuple[Any, Any]:
    """FasterTransformer's `GptContextDecoder` and `GptDecoder` on the weights of a GPT-2."""
    config = model.config
    sizes = {
        "num_heads": config.n_head,
        "size_per_head": config.n_embd // config.n_head,
        "inter_size": 4 * config.n_embd,
        "num_layers": config.n_layer,
    }
    with adapter.importable():
        from examples.pytorch.gpt.utils import gpt_decoder

        adapter.install()
        try:
            weights = gpt_decoder.GptLayerWeights(**sizes)
            weights.weights = [
                getattr(layer.get_submodule(part), each).detach()
                for part in _PARTS
                for each in ("weight", "bias")
                for layer in model.h
            ]
            weights.int8_weights, weights.int8_scales = [], []
            made = (
                gpt_decoder.GptContextDecoder(**sizes, layernorm_eps=config.layer_norm_epsilon),
                gpt_decoder.GptDecoder(**sizes, layernorm_eps=config.layer_norm_epsilon),
            )
            for decoder in made:
                decoder.set_weight(weights)
            return made
        finally:
            adapter.remove()


def _build(quick: bool) -> Workload:
    import torch
    from transformers import GPT2Config, GPT2Model

    batch, prompt, generated = (2, 256, 16) if quick else (4, 768, 48)
    room = prompt + generated
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=_BYTES, n_layer=_LAYERS, attn_implementation="eager", bos_token_id=0, eos_token_id=0
    )
    model = GPT2Model(config).eval()
    context, decoder = _decoders(model)
    text = corpus.text(batch * room).encode("ascii", "replace")
    tokens = torch.tensor(list(text)).view(batch, room)

    def by_transformers(network: Any) -> Result:
        found = []
        with torch.inference_mode():
            made = network(input_ids=tokens[:, :prompt], use_cache=True)
            found.append(made.last_hidden_state[:, -1])
            for at in range(prompt, room):
                past = made.past_key_values
                made = network(input_ids=tokens[:, at : at + 1], past_key_values=past, use_cache=True)
                found.append(made.last_hidden_state[:, -1])
        return Result({"hidden": torch.stack(found, 1).numpy()}, {})

    def by_fastertransformer() -> Result:
        with torch.inference_mode():
            x = model.wte(tokens) + model.wpe(torch.arange(room))
            lengths = torch.full((batch,), prompt, dtype=torch.int32)
            causal = torch.ones(prompt, prompt).tril().expand(batch, prompt, prompt)
            _, keys, values, last = context.forward(x[:, :prompt], causal, lengths, room)
            found = [last]
            none = torch.zeros(batch, room, dtype=torch.bool)
            found += [
                decoder.forward(
                    prompt, at + 1, 0, x[:, at], torch.full_like(lengths, at), keys, values, none[:, 0],
                    torch.zeros_like(lengths), none,
                )
                for at in range(prompt, room)
            ]  # fmt: skip
            return Result({"hidden": model.ln_f(torch.stack(found, 1)).numpy()}, {})

    def step(role: Role) -> Result:
        if role == "ours":
            return by_fastertransformer()
        model.set_attn_implementation("eager" if role == "eager" else "sdpa")
        return by_transformers(model)

    def reference() -> Result:
        exact = copy.deepcopy(model).double()
        exact.set_attn_implementation("sdpa")
        return by_transformers(exact)

    labels: dict[Role, str] = {
        "eager": "transformers, eager",
        "best": "transformers, sdpa",
        "ours": "FasterTransformer's decoders with anyflash",
    }
    return Workload(
        f"GPT-2, {_LAYERS} layers, {config.n_head} heads of {config.n_embd // config.n_head} (random): "
        f"{batch} prompts of {prompt} bytes of text, then {generated} tokens one by one; FasterTransformer's "
        "library is for CUDA, so transformers' model on the same weights stands beside it",
        "float32",
        step,
        reference,
        tuple(Variant(role, label, nullcontext) for role, label in labels.items()),
    )


ROWS = [
    Row(
        "fastertransformer-gpt",
        "FasterTransformer",
        "GPT, prompts and decoding",
        (
            Requirement("torch", "pip install torch==2.13.0"),
            Requirement("transformers", "pip install 'transformers>=5,<6'"),
            adapter.source,
        ),
        _build,
    )
]
