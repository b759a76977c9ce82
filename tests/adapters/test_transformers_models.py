"""Models of every kind give with our attention what they give with their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from adapters.tiny import BY_ID, DECODERS, MODELS, Tiny, close, jittered, present, tokens  # noqa: E402
from anyflash.adapters import transformers as adapter  # noqa: E402

BATCH, LENGTH = 3, 17


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    adapter.install()
    yield
    adapter.remove()


def call(model: Any, padding: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's main output, and where it means something."""
    name = type(model).__name__
    if name == "ViTModel":
        generator = torch.Generator().manual_seed(2)
        image = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=model.dtype)
        return model(pixel_values=image).last_hidden_state, None
    valid = present(BATCH, LENGTH, padding)
    if model.config.is_encoder_decoder:
        written = tokens(BATCH, 11)
        out = model(input_ids=tokens(BATCH, LENGTH), attention_mask=valid, decoder_input_ids=written)
        return out.logits, None
    out = model(input_ids=tokens(BATCH, LENGTH), attention_mask=valid)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state, valid


def attend(model: Any, implementation: str, padding: str) -> torch.Tensor:
    """The model's main output with this attention, where it means something."""
    model.set_attn_implementation(implementation)
    out, valid = call(model, padding)
    return out if valid is None else out[valid.bool()]


PADDINGS = {"vit": ["none"]}
CASES = [(m, p) for m in MODELS for p in PADDINGS.get(m.id, ["none", "left", "right", "holes"])]


@pytest.mark.parametrize(("tiny", "padding"), CASES, ids=[f"{m.id}-{p}" for m, p in CASES])
def test_outputs(tiny: Tiny, padding: str) -> None:
    model = tiny.make()
    with torch.no_grad():
        close(
            attend(model, adapter.IMPLEMENTATION, padding),
            attend(model, "eager", padding),
            attend(jittered(model), "eager", padding),
        )


@pytest.mark.parametrize("tiny", MODELS, ids=lambda m: m.id)
def test_gradients(tiny: Tiny) -> None:
    model = tiny.make().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradient(model: Any, implementation: str) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        attend(model, implementation, "none" if tiny.id == "vit" else "right").square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    close(
        gradient(model, adapter.IMPLEMENTATION), gradient(model, "eager"), gradient(jittered(model), "eager")
    )


def test_checkpointed_gradients() -> None:
    """Recomputing a layer sees the same mask, also where torch saves the layer's arguments."""
    model = BY_ID["mistral"].make().train()
    model.set_attn_implementation(adapter.IMPLEMENTATION)
    found = []
    for arguments in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if arguments is not None:
            model.activation_checkpointing_enable(arguments)
            model.enable_input_require_grads()
        model.zero_grad(set_to_none=True)
        attend(model, adapter.IMPLEMENTATION, "left").square().mean().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("tiny", DECODERS, ids=lambda m: m.id)
def test_generate(tiny: Tiny, padding: str, cache: str) -> None:
    """Longer than the windows, so that a window's cache wraps."""
    model = tiny.make()
    arguments: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "min_new_tokens": 9}
    if cache == "static":
        arguments["cache_implementation"] = "static"
    found = []
    for implementation in ("eager", adapter.IMPLEMENTATION):
        model.set_attn_implementation(implementation)
        prompt = tokens(BATCH, LENGTH)
        valid = present(BATCH, LENGTH, padding)
        found.append(
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt) if valid is None else valid, **arguments
            )
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("tiny", [BY_ID["t5"], BY_ID["bart"]], ids=lambda m: m.id)
def test_generate_from_an_encoder(tiny: Tiny) -> None:
    model = tiny.make()
    found = []
    for implementation in ("eager", adapter.IMPLEMENTATION):
        model.set_attn_implementation(implementation)
        found.append(
            model.generate(
                tokens(BATCH, LENGTH),
                attention_mask=present(BATCH, LENGTH, "right"),
                max_new_tokens=9,
                min_new_tokens=9,
                num_beams=2,
                do_sample=False,
            )
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("tiny", DECODERS, ids=lambda m: m.id)
def test_continued_prefill(tiny: Tiny) -> None:
    """A second block of queries over a filled cache: more keys than queries, aligned at the end."""
    from transformers import DynamicCache

    def second(model: Any, implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(BATCH, LENGTH)[:, :9], past_key_values=cache, use_cache=True)
            return model(tokens(BATCH, LENGTH)[:, 9:], past_key_values=cache, use_cache=True).logits

    model = tiny.make()
    close(second(model, adapter.IMPLEMENTATION), second(model, "eager"), second(jittered(model), "eager"))


PACKED = [3, 1, 8, 5]


def packed_positions() -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in PACKED])[None]


def packed_bounds() -> torch.Tensor:
    return torch.tensor([0, *PACKED]).cumsum(0).int()


def alone(model: Any) -> torch.Tensor:
    """Each of the packed sequences by itself, with the model's own attention."""
    model.set_attn_implementation("eager")
    parts = [model(part) for part in tokens(1, sum(PACKED)).split(PACKED, 1)]
    return torch.cat([p.logits[0] if hasattr(p, "logits") else p.last_hidden_state[0] for p in parts])


# GPT-OSS does not tell its masks of positions: it packs by bounds alone.
# alone.
PACKS = [
    (m, bounds) for m in DECODERS for bounds in (False, True) if bounds or m.id not in ("gpt2", "gpt_oss")
]


@pytest.mark.parametrize(
    ("tiny", "bounds"),
    PACKS,
    ids=[f"{m.id}-{'cu_seq_lens' if bounds else 'positions'}" for m, bounds in PACKS],
)
def test_packed_decoder(tiny: Tiny, bounds: bool) -> None:
    """Each packed sequence gives what it gives alone."""
    model = tiny.make()
    row = tokens(1, sum(PACKED))
    extra = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), packed_bounds()) if bounds else {}
    with torch.no_grad():
        model.set_attn_implementation(adapter.IMPLEMENTATION)
        ours = model(row, position_ids=packed_positions(), use_cache=False, **extra).logits[0]
        close(ours, alone(model), alone(jittered(model)))


@pytest.mark.parametrize("tiny", [BY_ID["bert"], BY_ID["modernbert"]], ids=lambda m: m.id)
def test_packed_encoder(tiny: Tiny) -> None:
    model = tiny.make()
    row, bounds = tokens(1, sum(PACKED)), packed_bounds()
    with torch.no_grad():
        model.set_attn_implementation(adapter.IMPLEMENTATION)
        ours = model(row, position_ids=packed_positions(), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
        close(ours.last_hidden_state[0], alone(model), alone(jittered(model)))


@pytest.mark.parametrize("tiny", [BY_ID["gemma2"], BY_ID["bert"]], ids=lambda m: m.id)
def test_bfloat16(tiny: Tiny) -> None:
    """As near to float32 as eager is, twice over."""
    narrow = tiny.make(torch.bfloat16)
    wide = tiny.make(torch.float32)
    wide.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        reference = attend(wide, "eager", "left")
        errors = {
            name: float((attend(narrow, name, "left").float() - reference).square().mean().sqrt())
            for name in ("eager", adapter.IMPLEMENTATION)
        }
    assert errors[adapter.IMPLEMENTATION] <= 2 * errors["eager"]


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", "left"])
def test_compiled(padding: str) -> None:
    """In one graph: while torch traces, masks are plain tensors."""
    model = BY_ID["mistral"].make()
    with torch.no_grad():
        own, moved = attend(model, "eager", padding), attend(jittered(model), "eager", padding)
        model.set_attn_implementation(adapter.IMPLEMENTATION)
        compiled = torch.compile(model, fullgraph=True)
        valid = present(BATCH, LENGTH, padding)
        out = compiled(input_ids=tokens(BATCH, LENGTH), attention_mask=valid).logits
    close(out if valid is None else out[valid.bool()], own, moved)
