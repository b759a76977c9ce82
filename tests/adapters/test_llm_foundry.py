"""MPT models of llm-foundry, with its "torch" attention and with ours under both names."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for distribution in ("llm-foundry", "mosaicml"):
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {distribution}: make test-systems", allow_module_level=True)

import anyflash.compat  # noqa: E402
from anyflash.adapters import llm_foundry as adapter  # noqa: E402
from anyflash.adapters._composer import importing  # noqa: E402

# MPT imports what packs tokens for "flash" only if flash_attn is there.
anyflash.compat.install()
importing.llm_foundry()
anyflash.compat.remove()

from llmfoundry.layers_registry import attention_implementations  # noqa: E402
from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM  # noqa: E402

DOUBLE = torch.float64
BATCH, S, HEADS, WIDTH = 2, 12, 4, 32

# Of the model: its attn_config, and what else of its configuration.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "alibi": ({"alibi": True}, {"learned_pos_emb": False}),
    "alibi-6-heads": ({"alibi": True}, {"learned_pos_emb": False, "n_heads": 6, "d_model": 48}),
    "grouped": ({"attn_type": "grouped_query_attention", "kv_n_heads": 2}, {}),
    "one-key-head": ({"attn_type": "multiquery_attention"}, {}),
    "window": ({"sliding_window_size": 3}, {}),
    "softcap": ({"attn_logit_softcapping": 0.5}, {}),
    "rope": ({"rope": True, "rope_impl": "hf"}, {"learned_pos_emb": False}),
    "scale": ({"softmax_scale": 0.9}, {}),
    "normed": ({"qk_ln": True, "clip_qkv": 0.7}, {}),
    "alibi-window-grouped": (
        {"alibi": True, "sliding_window_size": 4, "attn_type": "grouped_query_attention", "kv_n_heads": 2},
        {"learned_pos_emb": False},
    ),
}


@pytest.fixture(autouse=True)
def without() -> Iterator[None]:
    anyflash.compat.install()
    adapter.remove()
    yield
    adapter.remove()
    anyflash.compat.remove()


def mpt(attn_impl: str, attn: dict[str, Any], **settings: Any) -> Any:
    if attn.get("rope") and int(importlib.metadata.version("transformers").partition(".")[0]) > 4:
        pytest.skip("llm-foundry's rope needs transformers 4: make test-systems")
    torch.manual_seed(0)
    config = MPTConfig(
        **{"d_model": WIDTH, "n_heads": HEADS, "n_layers": 2, "max_seq_len": 32, "vocab_size": 64} | settings,
        expansion_ratio=2,
        attn_config={"attn_impl": attn_impl} | attn,
        init_config={"name": "baseline_", "init_std": 0.3},
        # transformers 5 no longer gives configurations one.
        pad_token_id=None,
        norm_type="layernorm",
    )
    model = MPTForCausalLM(config).to(DOUBLE)
    # Its tokens and positions start alike: spread them, or no mask would show.
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0].endswith(("wte", "wpe")):
            torch.nn.init.normal_(parameter)
    return model


def tokens(length: int = S) -> torch.Tensor:
    return torch.randint(3, 64, (BATCH, length), generator=torch.Generator().manual_seed(1))


def right_padded() -> torch.Tensor:
    present = torch.ones(BATCH, S, dtype=torch.bool)
    present[1, 7:] = False
    return present


def run(model: Any, present: torch.Tensor | None = None, **inputs: Any) -> list[torch.Tensor]:
    """Logits of the tokens that exist, and every gradient."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens(), attention_mask=present, **inputs).logits
    logits = logits if present is None else logits[present]
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Two layers forward and backward: a thousand roundings of the greatest value of all gradients together,
    since some, such as those of the keys' biases, are rounding themselves."""
    assert len(found) == len(wanted)
    top = max(float(t.abs().max()) for t in wanted[1:]) if len(wanted) > 1 else 0.0
    for mine, own in zip(found, wanted, strict=True):
        assert mine.shape == own.shape
        bound = 1024 * torch.finfo(own.dtype).eps * max(float(own.abs().max()), top)
        assert float((mine - own).abs().max()) <= bound


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("attn_impl", ["torch", "flash"])
@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, attn_impl: str, padded: bool) -> None:
    attn, settings = MODELS[name]
    present = right_padded() if padded else None
    own = run(mpt("torch", attn, **settings), present)
    adapter.install()
    close(run(mpt(attn_impl, attn, **settings), present), own)


@pytest.mark.parametrize("attn_impl", ["torch", "flash"])
@pytest.mark.parametrize("alibi", [False, True], ids=["positions", "alibi"])
def test_sequence_ids(alibi: bool, attn_impl: str) -> None:
    """Several sequences in one row, and padding behind them in another."""
    attn = {"attn_uses_sequence_id": True, "alibi": alibi}
    ids = torch.tensor([[0] * 4 + [1] * 6 + [2] * 2, [0] * 3 + [1] * 4 + [-1] * 5])
    given = {"present": right_padded(), "sequence_id": ids}
    own = run(mpt("torch", attn, learned_pos_emb=not alibi), **given)
    adapter.install()
    close(run(mpt(attn_impl, attn, learned_pos_emb=not alibi), **given), own)


@pytest.mark.parametrize("attn_impl", ["torch", "flash"])
@pytest.mark.parametrize("name", ["plain", "alibi", "grouped", "window", "rope", "alibi-window-grouped"])
def test_decoding(name: str, attn_impl: str) -> None:
    """A prompt with padding on the left and three steps over the KV cache, against its own."""
    attn, settings = MODELS[name]
    results, shapes = [], []
    for ours in (False, True):
        if ours:
            adapter.install()
        model = mpt(attn_impl if ours else "torch", attn, **settings).eval()
        present = torch.ones(BATCH, S, dtype=torch.bool)
        present[1, :3] = False
        ids, cache, steps = tokens(), None, []
        with torch.no_grad():
            for first, last in ((0, 9), (9, 10), (10, 11), (11, 12)):
                out = model(
                    input_ids=ids[:, first:last],
                    attention_mask=present[:, :last],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                steps.append(out.logits[present[:, first:last]])
        results.append(steps)
        shapes.append([t.shape for t in cache[0]])
    close(results[1], results[0])
    if attn_impl == "torch":
        assert shapes[0] == shapes[1]


# What MPT never passes alone: it puts padding into the bias too, and ALiBi is the same in every cut.
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "bias-cut-to-its-end": lambda: {"attn_bias": torch.randn(1, HEADS, S + 3, S + 5, dtype=DOUBLE)},
    "bias-of-keys": lambda: {"attn_bias": torch.randn(BATCH, 1, 1, S, dtype=DOUBLE)},
    "padding": lambda: {"key_padding_mask": right_padded()},
    "holes": lambda: {"key_padding_mask": torch.tensor([[i % 3 != 1 for i in range(S)]] * BATCH)},
    "window-both-ways": lambda: {"sliding_window_size": 2},
}


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(BATCH, S, WIDTH, dtype=DOUBLE)
    k, v = torch.randn(2, BATCH, S, WIDTH // 2, dtype=DOUBLE).unbind(0)
    given = CALLS[name]()
    results = []
    for ours in (False, True):
        if ours:
            adapter.install()
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attention_implementations.get("torch")(*leaves, HEADS, HEADS // 2, **given)[0]
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    close(results[1], results[0])


def test_generate() -> None:
    """transformers' own loop gives the same tokens."""
    found = []
    for ours in (False, True):
        if ours:
            adapter.install()
        model = mpt("torch", {"alibi": True}, learned_pos_emb=False).eval()
        if not hasattr(model, "generate"):
            pytest.skip("this transformers gives llm-foundry's models no generate: make test-systems")
        found.append(model.generate(tokens(5), max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*found)


def test_weights_are_its_own() -> None:
    adapter.install()
    model = mpt("torch", {})
    out = model(input_ids=tokens(), output_attentions=True)
    assert out.attentions[0].shape == (BATCH, HEADS, S, S)


def test_dropout() -> None:
    adapter.install()
    model = mpt("torch", {"attn_pdrop": 0.4})
    torch.manual_seed(1)
    first = model(input_ids=tokens()).logits
    torch.manual_seed(1)
    assert torch.equal(model(input_ids=tokens()).logits, first)
    assert not torch.equal(model(input_ids=tokens()).logits, first)
    model.eval()
    close([model(input_ids=tokens()).logits], [mpt("torch", {}).eval()(input_ids=tokens()).logits])


def refused(attn_bias: Any, key_padding_mask: Any, info: Any) -> Callable[[], object]:
    x = torch.randn(1, 4, 8)
    flash = attention_implementations.get("flash")
    return lambda: flash(
        x, x, x, 2, 2, attn_bias=attn_bias, key_padding_mask=key_padding_mask, flash_attn_padding_info=info
    )


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("attn_bias", (torch.zeros(1, 1, 1, 4), None, {})),
        ("key_padding_mask", (None, torch.ones(1, 4, dtype=torch.bool), {})),
        ("flash_attn_padding_info", (None, None, None)),
    ],
)
def test_refused(argument: str, given: Any) -> None:
    adapter.install()
    with pytest.raises(ValueError, match=argument):
        refused(*given)()


def state() -> list[Any]:
    return [attention_implementations.get(name) for name in ("torch", "flash")]


def test_remove_undoes_install() -> None:
    before = state()
    adapter.install()
    adapter.install()
    assert all(a is not b for a, b in zip(state(), before, strict=True))
    adapter.remove()
    assert all(a is b for a, b in zip(state(), before, strict=True))
    adapter.remove()
    assert adapter.self_check() is None
    assert all(a is b for a, b in zip(state(), before, strict=True))
