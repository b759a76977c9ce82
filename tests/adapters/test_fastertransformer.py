"""FasterTransformer's operators against transformers' GPT-2 and plain attention; then under its classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anyflash.adapters import fastertransformer as adapter  # noqa: E402
from anyflash.adapters._fastertransformer import caches  # noqa: E402
from anyflash.adapters._fastertransformer.operators import (  # noqa: E402
    ParallelGptContextDecoderOp,
    ParallelGptDecoderOp,
)
from anyflash.core.errors import InvalidCall, Unsupported  # noqa: E402

DOUBLE = torch.float64
LAYERS, HEADS, DIM, VOCABULARY, ROOM = 2, 4, 8, 40, 12
HIDDEN = HEADS * DIM
LENGTHS = torch.tensor([5, 8, 2], dtype=torch.int32)
LONGEST = 8
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=DOUBLE)
SHAPES = [
    (HIDDEN,), (HIDDEN,), (HIDDEN, 3 * HIDDEN), (3 * HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,),
    (HIDDEN,), (HIDDEN,), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN,), (4 * HIDDEN, HIDDEN), (HIDDEN,),
]  # fmt: skip
WEIGHTS = 12


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=DOUBLE, generator=generator)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 4096 * torch.finfo(DOUBLE).eps * max(float(wanted.detach().abs().max()), 1.0)
    assert float((found - wanted).detach().abs().max()) <= bound


def weights(seed: int = 0) -> list[torch.Tensor]:
    return [draw(*shape, seed=seed + i) / 6 for shape in SHAPES for i in range(LAYERS)]


def operators(given: list[torch.Tensor], **changed: Any) -> tuple[Any, Any]:
    settings = {
        "num_heads": HEADS, "size_per_head": DIM, "inter_size": 4 * HIDDEN, "num_layers": LAYERS,
        "tensor_para_size": 1, "pipeline_para_size": 1, "layernorm_eps": 1e-5,
        "layernorm_type": "pre_layernorm", "activation_type": "gelu", "has_adapters": False,
        "adapter_inter_size": 0, "int8_mode": 0,
    } | changed  # fmt: skip
    call = (*settings.values(), given, [], [])
    return ParallelGptContextDecoderOp(*call, True), ParallelGptDecoderOp(*call)


def causal_mask(lengths: torch.Tensor = LENGTHS, rows: int = LONGEST) -> torch.Tensor:
    """As `Gpt.generate` makes it."""
    mask = torch.ones(len(lengths), rows, rows, dtype=DOUBLE).tril()
    for b, length in enumerate(lengths):
        mask[b, length:] = 0
    return mask


def masked_tokens(lengths: torch.Tensor = LENGTHS) -> torch.Tensor:
    places = torch.arange(ROOM)
    return (places >= lengths[:, None]) & (places < int(lengths.max()))


def decode(
    op: Any, step: int, x: torch.Tensor, key_cache: Any, value_cache: Any, **given: Any
) -> torch.Tensor:
    """A step as `Gpt.generate` makes it: every row at the same slot, shorter prompts leave a gap."""
    rows = len(x)
    (out,) = op.forward(
        LONGEST,
        step,
        0,
        x,
        given.pop("sequence_lengths", torch.full((rows,), step - 1, dtype=torch.int32)),
        given.pop("finished", torch.zeros(rows, dtype=torch.bool)),
        given.pop("padding", LONGEST - LENGTHS),
        given.pop("masked", masked_tokens()),
        key_cache,
        value_cache,
        given.pop("cache_indirection", None),
        given.pop("slopes", None),
    )
    assert not given
    return out


def plain(op: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The layers on one sequence (tokens, hidden) with attention spelled out; bias (heads, q, k)."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5 + bias
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    for layer in op._stack.layers:
        x = op._stack.run(layer, x, attend)
    return x


def causal_bias(tokens: int, slopes: torch.Tensor | None = None) -> torch.Tensor:
    places = torch.arange(tokens)
    bias = torch.zeros(HEADS, tokens, tokens, dtype=DOUBLE)
    if slopes is not None:
        bias = slopes[:, None, None] * (places - places[:, None])
    return bias.masked_fill(places > places[:, None], -torch.inf)


def gpt(kind: str = "GPT2") -> tuple[Any, list[torch.Tensor]]:
    """A model of transformers, and its weights in FasterTransformer's order."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": HIDDEN,
        "n_positions": 32,
        "vocab_size": VOCABULARY,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}Model")(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    found = [
        getattr(layer.get_submodule(part), each).detach()
        for part in parts
        for each in ("weight", "bias")
        for layer in model.h
    ]
    return model, found


def embed(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    word, place = (
        (model.wte, model.wpe) if hasattr(model, "wte") else (model.tokens_embed, model.positions_embed)
    )
    return (word(tokens) + place(positions)).detach()


@pytest.mark.parametrize("kind", ["GPT2", "OpenAIGPT"])
def test_prompts(kind: str) -> None:
    """Ragged prompts against transformers' model on each alone; OpenAI's first GPT has its norms last."""
    model, given = gpt(kind)
    first = "pre_layernorm" if kind == "GPT2" else "post_layernorm"
    prompts, _ = operators(given, layernorm_type=first)
    tokens = torch.randint(VOCABULARY, (3, LONGEST), generator=torch.Generator().manual_seed(1))
    out, key_cache, value_cache, last = prompts.forward(
        embed(model, tokens, torch.arange(LONGEST)), causal_mask(), LENGTHS, ROOM
    )
    assert key_cache.shape == (LAYERS, 3, HEADS, DIM // 2, ROOM, 2)
    assert value_cache.shape == (LAYERS, 3, HEADS, ROOM, DIM)
    norm = model.ln_f if kind == "GPT2" else torch.nn.Identity()
    for b, n in enumerate(LENGTHS.tolist()):
        with torch.no_grad():
            own = model(input_ids=tokens[b : b + 1, :n]).last_hidden_state[0]
        close(norm(out[b, :n]), own)
        close(norm(last[b]), own[-1])
        assert (out[b, n:] == 0).all()


def test_tokens() -> None:
    """Ragged prompts, then tokens one by one: each as transformers' model sees the whole at once."""
    model, given = gpt()
    prompts, steps = operators(given)
    tokens = torch.randint(VOCABULARY, (3, ROOM), generator=torch.Generator().manual_seed(1))
    x = embed(model, tokens, torch.arange(ROOM))
    _, key_cache, value_cache, _ = prompts.forward(x[:, :LONGEST], causal_mask(), LENGTHS, ROOM)
    # What is not there must not be looked at, whatever lies in its memory.
    hidden = masked_tokens()
    for b in range(3):
        caches.as_rows(key_cache)[:, b, :, hidden[b]] = torch.nan
        value_cache[:, b, :, hidden[b]] = torch.nan
        caches.as_rows(key_cache)[:, b, :, LONGEST:] = torch.nan
        value_cache[:, b, :, LONGEST:] = torch.nan
    for step in range(LONGEST + 1, ROOM + 1):
        out = decode(steps, step, x[:, step - 1], key_cache, value_cache)
        for b, n in enumerate(LENGTHS.tolist()):
            positions = torch.cat([torch.arange(n), torch.arange(LONGEST, step)])
            with torch.no_grad():
                own = model(input_ids=tokens[b : b + 1, positions], position_ids=positions[None])
            close(model.ln_f(out[b]), own.last_hidden_state[0, -1])


def test_slopes() -> None:
    """ALiBi: distances within a prompt, then without the gap that padding leaves."""
    prompts, steps = operators(weights())
    x = draw(3, ROOM, HIDDEN)
    out, key_cache, value_cache, _ = prompts.forward(
        x[:, :LONGEST], causal_mask(), LENGTHS, ROOM, linear_bias_slopes=SLOPES
    )
    for b, n in enumerate(LENGTHS.tolist()):
        close(out[b, :n], plain(prompts, x[b, :n], causal_bias(n, SLOPES)))
    for step in range(LONGEST + 1, ROOM + 1):
        out = decode(steps, step, x[:, step - 1], key_cache, value_cache, slopes=SLOPES)
        for b, n in enumerate(LENGTHS.tolist()):
            whole = torch.cat([x[b, :n], x[b, LONGEST:step]])
            close(out[b], plain(prompts, whole, causal_bias(len(whole), SLOPES))[-1])


@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "slopes"])
def test_another_mask(slopes: torch.Tensor | None) -> None:
    """A prefix that all rows see: read, at FasterTransformer's -10000, which is finite."""
    prompts, _ = operators(weights())
    x = draw(2, 6, HIDDEN)
    mask = torch.ones(2, 6, 6, dtype=DOUBLE).tril()
    mask[:, :, :3] = 1
    mask[1, 4] = 0
    mask[0, 5, 1] = 0.9999
    out, *_ = prompts.forward(x, mask, torch.tensor([6, 6]), linear_bias_slopes=slopes)
    places = torch.arange(6)
    for b in range(2):
        bias = (1 - mask[b]) * -10000.0 + torch.zeros(HEADS, 1, 1, dtype=DOUBLE)
        if slopes is not None:
            bias = bias + slopes[:, None, None] * (places - places[:, None])
        close(out[b], plain(prompts, x[b], bias))


def test_equal_prompts_run_once() -> None:
    prompts, _ = operators(weights())
    x = draw(2, LONGEST, HIDDEN)
    lengths = LENGTHS[:2]
    back = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    one_by_one = prompts.forward(x[back], causal_mask(lengths)[back], lengths[back], ROOM)
    once = torch.tensor([1, 0], dtype=torch.int32)
    compact = prompts.forward(x[back], causal_mask(lengths)[back], lengths[back], ROOM, once, back)
    for mine, wanted in zip(compact, one_by_one, strict=True):
        close(mine, wanted)
    assert compact[1].stride() == one_by_one[1].stride()


def test_beams() -> None:
    """Slots that beams have taken over from each other, against caches where everything was moved."""
    _, steps = operators(weights())
    rows, beams = 6, 3
    key_cache, value_cache = draw(2, LAYERS, rows, HEADS, ROOM, DIM).unbind(0)
    generator = torch.Generator().manual_seed(2)
    indirection = torch.randint(beams, (2, beams, ROOM), generator=generator, dtype=torch.int32)
    source = (indirection + torch.arange(0, rows, beams)[:, None, None]).flatten(0, 1)

    def moved(cache: torch.Tensor) -> torch.Tensor:
        taken = [cache[:, source[b], :, torch.arange(ROOM)].movedim(0, -2) for b in range(rows)]
        return torch.stack(taken, 1)

    x = draw(rows, HIDDEN)
    free = {"masked": torch.zeros(rows, ROOM, dtype=torch.bool), "padding": torch.zeros(rows).int()}
    taken = caches.as_chunks(moved(key_cache), 2), moved(value_cache)
    given = caches.as_chunks(key_cache, 2), value_cache
    found = decode(steps, LONGEST + 1, x, *given, cache_indirection=indirection, **free)
    close(found, decode(steps, LONGEST + 1, x, *taken, **free))


def test_finished_rows_write_nothing() -> None:
    _, steps = operators(weights())
    key_cache, value_cache = caches.new(draw(1), (LAYERS, 3, HEADS, ROOM, DIM), 2)
    finished = torch.tensor([False, True, False])
    decode(steps, LONGEST + 1, draw(3, HIDDEN), key_cache, value_cache, finished=finished)
    for cache in (key_cache, value_cache):
        assert (cache[:, 1] == 0).all()
        assert (cache[:, ::2] != 0).any(dim=(0, 2, 3, 4) if cache.ndim == 5 else (0, 2, 3, 4, 5)).all()


def test_local_batches() -> None:
    """`ite` says which rows of the caches a call is for."""
    _, steps = operators(weights())
    x, shape = draw(4, HIDDEN), (LAYERS, 4, HEADS, ROOM, DIM)
    both = caches.as_chunks(draw(*shape), 2), draw(*shape, seed=1)
    apart = [cache.clone() for cache in both]
    free = torch.zeros(4, ROOM, dtype=torch.bool)
    lengths, no = torch.tensor([8, 9, 8, 7], dtype=torch.int32), torch.zeros(4, dtype=torch.bool)
    call = lambda ite, part: (
        LONGEST,
        10,
        ite,
        x[part],
        lengths[part],
        no[part],
        lengths[part] * 0,
        free[part],
    )
    (whole,) = steps.forward(*call(0, slice(None)), *both)
    for ite in range(2):
        part = slice(2 * ite, 2 * ite + 2)
        (out,) = steps.forward(*call(ite, part), *apart)
        close(out, whole[part])
    for mine, wanted in zip(apart, both, strict=True):
        close(mine, wanted)


def test_caches_are_read_in_place() -> None:
    """Ours take no copy; those in FasterTransformer's own order of memory give the same."""
    prompts, steps = operators(weights())
    x = draw(3, ROOM, HIDDEN)
    _, key_cache, value_cache, _ = prompts.forward(x[:, :LONGEST], causal_mask(), LENGTHS, ROOM)
    assert caches.as_rows(key_cache).data_ptr() == key_cache.data_ptr()
    theirs = key_cache.contiguous(), value_cache.clone()
    for step in (LONGEST + 1, LONGEST + 2):
        out = decode(steps, step, x[:, step - 1], key_cache, value_cache)
        assert torch.equal(decode(steps, step, x[:, step - 1], *theirs), out)
    assert torch.equal(theirs[0], key_cache)


REFUSED = {
    "2 processes": {"tensor_para_size": 2},
    "int8_mode 1": {"int8_mode": 1},
    "adapters": {"has_adapters": True},
    "'GeGLU'": {"activation_type": "GeGLU"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        operators(weights(), **REFUSED[reason])


def test_full_caches() -> None:
    _, steps = operators(weights())
    key_cache, value_cache = caches.new(draw(1), (LAYERS, 3, HEADS, ROOM, DIM), 2)
    with pytest.raises(InvalidCall, match=r"sequence_lengths: up to 12; expected less than 12"):
        decode(steps, ROOM + 1, draw(3, HIDDEN), key_cache, value_cache)


def test_install_and_remove() -> None:
    before = dict(torch.classes.__dict__)
    adapter.install()
    first = torch.classes.FasterTransformer
    adapter.install()
    assert torch.classes.FasterTransformer is first
    adapter.remove()
    assert torch.classes.__dict__ == before
    adapter.remove()
    assert adapter.self_check() is None


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(adapter.target), "installed", lambda self: "5.0.0.116")
    with pytest.warns(UserWarning, match=r"5.0.0.116 is outside .*FasterTransformer>=5.3,<5.4"):
        adapter.install()
    adapter.remove()


class Greedy:
    """In the place of FasterTransformer's sampling, which is for CUDA: the likeliest token."""

    def __init__(self, *sizes: Any) -> None: ...

    def setup(self, *settings: Any) -> None: ...

    def broadcast_from_last_pipeline(self, tensors: Any) -> None: ...

    def forward(self, logits: torch.Tensor, step: int, *given: Any) -> torch.Tensor:
        tokens, sequence_lengths = given[21], given[23]
        tokens[step] = logits.argmax(-1)
        sequence_lengths += 1
        return torch.tensor([False])


def test_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Gpt.generate` of FasterTransformer gives the tokens that transformers' model does."""
    if adapter.source.folder() is None:
        pytest.skip(f"{adapter.source.variable} names no checkout of FasterTransformer")
    model, given = gpt()
    monkeypatch.setattr(torch.classes, "load_library", lambda path: None)
    monkeypatch.setitem(torch.classes.__dict__, "FasterTransformer", SimpleNamespace(DynamicDecodeOp=Greedy))
    with adapter.importable():
        from examples.pytorch.gpt.utils import gpt_decoder

        adapter.install()
        try:
            system = gpt_decoder.Gpt(
                HEADS, DIM, LAYERS, VOCABULARY, 0, VOCABULARY, "", max_seq_len=32, layernorm_eps=1e-5,
                inference_data_type=torch.float64, shared_contexts_ratio=0.0,
            )  # fmt: skip
            system.weight = gpt_decoder.GptLayerWeights.from_config(system.config)
            system.weight.weights, system.weight.int8_weights, system.weight.int8_scales = given, [], []
            assert [tuple(w.shape) for w in given] == system.weight.expected_weight_shapes
            system.context_decoder.set_weight(system.weight)
            system.decoder.set_weight(system.weight)
            system.word_embedding.weight = system.lm_head.weight = model.wte.weight
            system.position_encoding.weight = model.wpe.weight
            system.post_decoder_layernorm.load_state_dict(model.ln_f.state_dict())
            assert isinstance(system.decoder.ft_op, ParallelGptDecoderOp)
            prompt = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
            found = system.generate(prompt.int(), torch.tensor([5, 5]), 8)["output_token_ids"][:, 0]
        finally:
            adapter.remove()
    tokens = prompt
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=tokens).last_hidden_state[:, -1] @ model.wte.weight.T
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert found.tolist() == tokens.tolist()
