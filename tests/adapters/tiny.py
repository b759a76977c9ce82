"""Tiny random models, one of each kind of attention that transformers has."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

VOCABULARY = 96
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PROJECTIONS = ("q", "k", "query", "key", "c_attn", "Wqkv", "query_key_value")
_ENCODER = {k: v for k, v in _DECODER.items() if k not in ("num_key_value_heads", "head_dim")}


@dataclass(frozen=True)
class Tiny:
    """`module` is a folder of transformers.models, `config` and `model` are classes of it."""

    id: str
    module: str
    config: str
    model: str
    sizes: dict[str, Any] = field(hash=False)
    decoder: bool = False

    def make(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        home = f"transformers.models.{self.module}"
        config = getattr(importlib.import_module(f"{home}.configuration_{self.module}"), self.config)
        model = getattr(importlib.import_module(f"{home}.modeling_{self.module}"), self.model)
        torch.manual_seed(0)
        made = model(config(**self.sizes | changes)).to(dtype).eval()
        for name, parameter in made.named_parameters():
            # Random weights start so small that attention is nearly uniform: spread it, or no mask would
            # show.
            if name.rsplit(".", 2)[-2].removesuffix("_proj") in _PROJECTIONS:
                parameter.data.mul_(8.0)
            if name.endswith("sinks"):
                parameter.data.normal_()
        return made


MODELS = [
    Tiny("llama", "llama", "LlamaConfig", "LlamaForCausalLM", _DECODER, decoder=True),
    Tiny(
        "mistral",
        "mistral",
        "MistralConfig",
        "MistralForCausalLM",
        _DECODER | {"sliding_window": 5},
        decoder=True,
    ),
    Tiny(
        "gemma2",
        "gemma2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _DECODER | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        decoder=True,
    ),
    Tiny(
        "gemma3",
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _DECODER
        | {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
        decoder=True,
    ),
    Tiny(
        "gpt_oss",
        "gpt_oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        _DECODER | {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
        decoder=True,
    ),
    Tiny(
        "gpt2",
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        decoder=True,
    ),
    Tiny("bert", "bert", "BertConfig", "BertModel", _ENCODER),
    Tiny(
        "modernbert",
        "modernbert",
        "ModernBertConfig",
        "ModernBertModel",
        _ENCODER
        | {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    Tiny(
        "t5",
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0},
    ),
    Tiny(
        "bart",
        "bart",
        "BartConfig",
        "BartForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 128}
        | {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
        | {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        | {"forced_eos_token_id": None, "dropout": 0.0},
    ),
    Tiny(
        "vit",
        "vit",
        "ViTConfig",
        "ViTModel",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        | {"image_size": 16, "patch_size": 4},
    ),
]
BY_ID = {m.id: m for m in MODELS}
DECODERS = [m for m in MODELS if m.decoder]


@cache
def tokens(batch: int, length: int) -> torch.Tensor:
    """Ordinary tokens only: none is a padding or an end."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def present(batch: int, length: int, padding: str) -> torch.Tensor | None:
    """A 2-D attention mask whose entries have different lengths: "none", "left", "right", or "holes"
    within."""
    if padding == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for i in range(1, batch):
        cut = 2 * i + 1
        if padding == "holes":
            mask[i, cut::4] = 0
        elif padding == "left":
            mask[i, :cut] = 0
        else:
            mask[i, length - cut :] = 0
    return mask


def jittered(model: Any) -> Any:
    """The model with every parameter moved by one rounding, up or down: what its outputs then move by is what
    rounding means to it."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in moved.parameters():
        sign = 2 * torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.dtype) - 1
        parameter.data.mul_(1 + torch.finfo(parameter.dtype).eps * sign)
    return moved


def close(ours: torch.Tensor, own: torch.Tensor, moved: torch.Tensor) -> None:
    ours, own, moved = (t.detach() for t in (ours, own, moved))
    difference, bound = float((ours - own).abs().max()), 4 * float((moved - own).abs().max())
    assert difference <= bound, f"differ by {difference:.1e}, rounding makes at most {bound:.1e}"
