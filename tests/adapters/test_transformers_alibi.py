"""BLOOM, MPT and Falcon, which do not use transformers' attention interface, beside their own attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402
from transformers.models.bloom import modeling_bloom as bloom  # noqa: E402
from transformers.models.falcon import modeling_falcon as falcon  # noqa: E402
from transformers.models.mpt import modeling_mpt as mpt  # noqa: E402

from adapters.tiny import VOCABULARY, Tiny, close, jittered, present, tokens  # noqa: E402
from anyflash.adapters import pytorch  # noqa: E402
from anyflash.adapters import transformers as adapter  # noqa: E402
from anyflash.adapters._transformers import mask as masks  # noqa: E402
from anyflash.core.errors import Unsupported  # noqa: E402

BATCH, LENGTH = 3, 17
_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FALCON = _SPECIAL | {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "ffn_hidden_size": 64,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "bias": True,
}  # fmt: skip
# Six heads: slopes of heads beyond a power of two are made otherwise.
MODELS = [
    Tiny(
        "bloom",
        "bloom",
        "BloomConfig",
        "BloomForCausalLM",
        _SPECIAL | {"hidden_size": 48, "n_layer": 2, "n_head": 6, "hidden_dropout": 0.0},
    ),
    Tiny(
        "mpt",
        "mpt",
        "MptConfig",
        "MptForCausalLM",
        _SPECIAL | {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    Tiny(
        "falcon-alibi",
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    Tiny("falcon-one-key-head", "falcon", "FalconConfig", "FalconForCausalLM", _FALCON),
    Tiny(
        "falcon-groups",
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
]
BY_ID = {m.id: m for m in MODELS}
# Falcon's "eager" adds ALiBi twice.
OWN = {m.id: "sdpa" if m.module == "falcon" else "eager" for m in MODELS}
EACH = pytest.mark.parametrize("tiny", MODELS, ids=lambda m: m.id)


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    adapter.install()
    yield
    adapter.remove()


def attend(model: Any, implementation: str, padding: str) -> torch.Tensor:
    """Logits of the tokens that exist."""
    model.set_attn_implementation(implementation)
    valid = present(BATCH, LENGTH, padding)
    logits = model(input_ids=tokens(BATCH, LENGTH), attention_mask=valid).logits
    return logits if valid is None else logits[valid.bool()]


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@EACH
def test_outputs(tiny: Tiny, padding: str) -> None:
    model = tiny.make()
    with torch.no_grad():
        own, moved = (attend(m, OWN[tiny.id], padding) for m in (model, jittered(model)))
        close(attend(model, adapter.IMPLEMENTATION, padding), own, moved)


@pytest.mark.parametrize("padding", ["none", "left"])
@EACH
def test_gradients(tiny: Tiny, padding: str) -> None:
    model = tiny.make().train()

    def gradient(model: Any, implementation: str) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        attend(model, implementation, padding).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    own, moved = (gradient(m, OWN[tiny.id]) for m in (model, jittered(model)))
    close(gradient(model, adapter.IMPLEMENTATION), own, moved)


@pytest.mark.parametrize("padding", ["none", "left"])
@EACH
def test_generate(tiny: Tiny, padding: str) -> None:
    model, prompt, valid = tiny.make(), tokens(BATCH, LENGTH), present(BATCH, LENGTH, padding)
    mask = torch.ones_like(prompt) if valid is None else valid
    found = []
    for implementation in (OWN[tiny.id], adapter.IMPLEMENTATION):
        model.set_attn_implementation(implementation)
        found.append(
            model.generate(prompt, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, do_sample=False)
        )
    assert torch.equal(*found)


@EACH
def test_continued_prefill(tiny: Tiny) -> None:
    """A second block of queries over a filled cache: more keys than queries, aligned at the end."""

    def second(model: Any, implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(BATCH, LENGTH)[:, :9], past_key_values=cache, use_cache=True)
            return model(tokens(BATCH, LENGTH)[:, 9:], past_key_values=cache, use_cache=True).logits

    model = tiny.make()
    own, moved = (second(m, OWN[tiny.id]) for m in (model, jittered(model)))
    close(second(model, adapter.IMPLEMENTATION), own, moved)


def test_static_cache() -> None:
    """The only one of them whose ALiBi fits a cache of fixed length."""
    model, prompt = BY_ID["bloom"].make(), tokens(BATCH, LENGTH)
    found = []
    for implementation in ("eager", adapter.IMPLEMENTATION):
        model.set_attn_implementation(implementation)
        arguments = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
        mask = present(BATCH, LENGTH, "left")
        found.append(model.generate(prompt, attention_mask=mask, cache_implementation="static", **arguments))
    assert torch.equal(*found)


@EACH
def test_no_matrix_of_the_mask(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("a (q, k) matrix was asked for")

    monkeypatch.setattr(masks, "sdpa_mask", build)
    model = tiny.make()
    with torch.no_grad():
        for padding in ("none", "left", "holes"):
            attend(model, adapter.IMPLEMENTATION, padding)


def test_checkpointed_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        model = BY_ID["bloom"].make().train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        attend(model, adapter.IMPLEMENTATION, "left").square().mean().backward()
        found.append(model.transformer.h[0].self_attention.query_key_value.weight.grad)
    assert torch.equal(*found)


def test_groups_are_not_repeated_in_the_cache() -> None:
    model = BY_ID["falcon-groups"].make(attn_implementation="anyflash")
    with torch.no_grad():
        cache = model(tokens(BATCH, LENGTH), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (BATCH, 2, LENGTH, 8)


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi"])
def test_dropout(name: str) -> None:
    """In training only, from torch's generator."""
    model = BY_ID[name].make(attention_dropout=0.5).train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(attend(model, adapter.IMPLEMENTATION, "none"))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    model.eval()
    assert torch.equal(*(attend(model, adapter.IMPLEMENTATION, "none") for _ in range(2)))


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-alibi"])
def test_weights_are_refused(name: str) -> None:
    model = BY_ID[name].make(attn_implementation="anyflash")
    with pytest.raises(Unsupported, match="output_attentions"):
        model(tokens(BATCH, LENGTH), output_attentions=True)


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi"])
def test_bfloat16(name: str) -> None:
    """As near to float32 as its own is, twice over."""
    narrow, wide = BY_ID[name].make(torch.bfloat16), BY_ID[name].make()
    wide.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        reference = attend(wide, OWN[name], "left")
        errors = [
            float((attend(narrow, i, "left").float() - reference).square().mean().sqrt())
            for i in (OWN[name], adapter.IMPLEMENTATION)
        ]
    assert errors[1] <= 2 * errors[0]


def state() -> list[Any]:
    owners = [
        bloom, mpt, falcon, bloom.BloomPreTrainedModel, mpt.MptPreTrainedModel, falcon.FalconPreTrainedModel,
        bloom.BloomAttention, mpt.MptAttention, mpt.MptBlock, falcon.FalconAttention,
    ]  # fmt: skip
    found = [dict(vars(owner)) for owner in owners] + [dict(falcon.FALCON_ATTENTION_CLASSES)]
    return [{k: v for k, v in names.items() if not k.startswith("__")} for names in found]


@EACH
def test_others_are_untouched(tiny: Tiny) -> None:
    """A model with its own attention gives the same bits while the adapter is there, and everything is back
    after it."""
    model = tiny.make()
    with torch.no_grad():
        during = attend(model, OWN[tiny.id], "left")
        adapter.remove()
        before = state()
        adapter.install()
        adapter.install()
        assert state() != before
        adapter.remove()
        assert state() == before
        valid = present(BATCH, LENGTH, "left")
        after = model(input_ids=tokens(BATCH, LENGTH), attention_mask=valid).logits[valid.bool()]
    assert torch.equal(during, after)


def test_beside_another_adapter() -> None:
    model = BY_ID["falcon-groups"].make()
    with torch.no_grad():
        alone = attend(model, adapter.IMPLEMENTATION, "left")
        with pytorch.use():
            assert torch.equal(attend(model, adapter.IMPLEMENTATION, "left"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-alibi"])
def test_compiled(name: str) -> None:
    """In one graph: while torch traces, masks are plain tensors."""
    model = BY_ID[name].make()
    valid = present(BATCH, LENGTH, "left")
    with torch.no_grad():
        own, moved = (attend(m, OWN[name], "left") for m in (model, jittered(model)))
        model.set_attn_implementation(adapter.IMPLEMENTATION)
        out = torch.compile(model, fullgraph=True)(input_ids=tokens(BATCH, LENGTH), attention_mask=valid)
    close(out.logits[valid.bool()], own, moved)
