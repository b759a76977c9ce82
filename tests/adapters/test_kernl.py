"""Attention found in graphs, however it is spelled, and put there by Kernl's own patterns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.backends import registry  # noqa: E402
from torch._dynamo.exc import InvalidBackend  # noqa: E402
from torch.nn import functional  # noqa: E402

from adapters.spellings import BIAS, DOUBLE, SPELLINGS, B, D, H, S, T, draw, fused, methods, qkv, softcap  # noqa: E402
from anyflash.adapters import kernl as adapter  # noqa: E402
from anyflash.adapters import pytorch  # noqa: E402
from anyflash.adapters._kernl.backend import rewrite  # noqa: E402
from anyflash.adapters._kernl.call import attention_of_kernl  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function compiled with our graphs, and the number of attentions in each."""
    counts: list[int] = []

    def backend(gm: Any, inputs: Any) -> Any:
        counts.append(rewrite(gm))
        return gm.forward

    return torch.compile(function, backend=backend), counts


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 1024 * torch.finfo(wanted.dtype).eps * max(float(wanted.detach().abs().max()), 1.0)
    assert float((found - wanted).detach().abs().max()) <= bound


def trained(function: Callable[..., Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad((out * draw(*out.shape, seed=9)).sum(), leaves)]


@pytest.mark.parametrize(
    ("function", "lead", "number"),
    SPELLINGS,
    ids=[f"{f.__name__}{len(lead) + 2}d" for f, lead, _ in SPELLINGS],
)
def test_spellings(function: Callable[..., Any], lead: tuple[int, ...], number: int) -> None:
    ours, counts = counted(function)
    inputs = qkv(*lead)
    for mine, wanted in zip(trained(ours, inputs), trained(function, inputs), strict=True):
        close(mine, wanted)
    assert counts == [number]


def weights_returned(q, k, v):
    p = (q @ k.mT).softmax(-1)
    return p @ v, p


def scores_returned(q, k, v):
    s = q @ k.mT
    return s.softmax(-1) @ v, s


KEPT = {
    "weights-returned": weights_returned,
    "scores-returned": scores_returned,
    "over-queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "transposed": lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT,
    "another-function": lambda q, k, v: (q @ k.mT).exp().softmax(-1) @ v,
    "all-dropped": lambda q, k, v: functional.dropout((q @ k.mT).softmax(-1), 1.0) @ v,
    "over-a-leading-axis": lambda q, k, v: torch.einsum("bhij,bhjd->bid", (q @ k.mT).softmax(-1), v),
    "one-head-of-keys": lambda q, k, v: torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1) @ v,
    "not-with-values": lambda q, k, v: torch.einsum("bhij,bhid->bhjd", (q @ k.mT).softmax(-1), q),
    "squared": lambda q, k, v: (q @ k.mT).softmax(-1).square() @ v,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_attention_stays(name: str) -> None:
    ours, counts = counted(KEPT[name])
    found, wanted = ours(*qkv(B, H)), KEPT[name](*qkv(B, H))
    for mine, own in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, wanted)), strict=True):
        assert torch.equal(mine, own)
    assert counts == [0]


def test_gradient_of_a_bias() -> None:
    function = lambda q, k, v, bias: (q @ k.mT + bias).softmax(-1) @ v
    ours, counts = counted(function)
    inputs = [*qkv(B, H), draw(1, H, 1, T)]
    for mine, wanted in zip(trained(ours, inputs), trained(function, inputs), strict=True):
        close(mine, wanted)
    assert counts == [1]


def test_row_without_a_key() -> None:
    """torch gives NaN there; ours is 0, as everywhere in anyflash."""
    hidden = torch.zeros(S, T, dtype=torch.bool)
    hidden[1] = True
    ours, _ = counted(lambda q, k, v: (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v)
    out = ours(*qkv(B, H))
    assert not out.isnan().any()
    assert (out[:, :, 1] == 0).all()


def test_dropout_in_training() -> None:
    """Probabilities are dropped or scaled up, nothing else: v shows them one by one."""
    q, k, _ = qkv(B, H)
    ours, counts = counted(lambda q, k, v: functional.dropout((q @ k.mT).softmax(-1), 0.25) @ v)
    found = ours(q, k, torch.eye(T, dtype=DOUBLE).expand(B, H, T, T)) * 0.75
    wanted = (q @ k.mT).softmax(-1)
    kept = found != 0
    assert 0.5 < kept.double().mean() < 0.95
    close(torch.where(kept, found, wanted), wanted)
    assert counts == [1]


@pytest.mark.parametrize("then", [None, "aot_eager"])
def test_backend(then: str | None) -> None:
    options = None if then is None else {"then": then}
    ours = torch.compile(softcap, backend=adapter.backend, options=options, fullgraph=True)
    for mine, wanted in zip(trained(ours, qkv(B, H)), trained(softcap, qkv(B, H)), strict=True):
        close(mine, wanted)


@pytest.mark.parametrize("then", [None, "aot_eager"])
def test_any_length(then: str | None) -> None:
    """One graph for all lengths, whose scale and mask depend on symbols."""

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT / math.sqrt(q.size(-1)) + BIAS[:, : q.shape[-2], : k.shape[-2]]
        return scores.softmax(-1) @ v

    options = None if then is None else {"then": then}
    ours = torch.compile(masked, backend=adapter.backend, options=options, dynamic=True)
    for rows, keys in ((2, 3), (3, 5), (S, T)):
        inputs = [t[..., :n, :].contiguous() for t, n in zip(qkv(B, H), (rows, keys, keys), strict=True)]
        for mine, wanted in zip(trained(ours, inputs), trained(masked, inputs), strict=True):
            close(mine, wanted)


def test_unknown_option() -> None:
    with pytest.raises(Exception, match=r'options: depth; expected \{"then"'):
        torch.compile(softcap, backend=adapter.backend, options={"depth": 3})(*qkv(B, H))


def test_install_and_remove() -> None:
    before = set(registry._BACKENDS), set(registry._COMPILER_FNS)
    adapter.install()
    adapter.install()
    try:
        close(torch.compile(methods, backend="anyflash")(*qkv(B, H)), methods(*qkv(B, H)))
    finally:
        adapter.remove()
    assert (set(registry._BACKENDS), set(registry._COMPILER_FNS)) == before
    adapter.remove()
    with pytest.raises(InvalidBackend):
        torch.compile(methods, backend="anyflash")
    assert adapter.self_check() is None


def test_beside_another_adapter() -> None:
    """torch's own attention is ours meanwhile, and stays so in a graph that is rewritten."""
    wanted = fused(*qkv(B, H))
    adapter.install()
    try:
        with pytorch.use():
            found = torch.compile(fused, backend="anyflash")(*qkv(B, H))
            close(fused(*qkv(B, H)), wanted)
    finally:
        adapter.remove()
    close(found, wanted)


MODELS = {
    "bert": ("BertConfig", "BertModel", {"num_hidden_layers": 2}, 2),
    "gpt2": ("GPT2Config", "GPT2Model", {"n_layer": 2, "n_embd": 32, "n_head": 4}, 2),
    "llama": ("LlamaConfig", "LlamaModel", {"num_hidden_layers": 2, "num_key_value_heads": 2}, 2),
    "t5": ("T5Config", "T5EncoderModel", {"num_layers": 2, "d_model": 32, "d_kv": 8, "num_heads": 4}, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str) -> None:
    """Every layer's eager attention, padding included, with the gradients of all parameters."""
    transformers = pytest.importorskip("transformers")
    config, kind, settings, layers = MODELS[name]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}
    if name in ("gpt2", "t5"):
        sizes = {"vocab_size": 50}
    torch.manual_seed(0)
    made = getattr(transformers, config)(**sizes, **settings, attn_implementation="eager")
    model = getattr(transformers, kind)(made).double().eval()
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    present = torch.ones_like(tokens)
    present[1, 6:] = 0

    def run(network: Any) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        hidden = network(input_ids=tokens, attention_mask=present).last_hidden_state[present.bool()]
        hidden.square().mean().backward()
        return [hidden, *(p.grad for p in model.parameters() if p.grad is not None)]

    own = run(model)
    ours, counts = counted(model)
    # transformers takes its softmax in float32 here and there: then its own rounding is what differs.
    bound = 64 * torch.finfo(torch.float32).eps
    for mine, wanted in zip(run(ours), own, strict=True):
        assert float((mine - wanted).detach().abs().max()) <= bound * max(
            float(wanted.detach().abs().max()), 1.0
        )
    assert sum(counts) == layers


# What Kernl's patterns hand over, by position: the shape of q, that of k and v, mask, causal.
CALLS = {
    "mask": ((B, H, S, D), (B, H, T, D), (B, 1, 1, T), False),
    "position-bias": ((B, H, S, D), (B, H, T, D), (1, H, S, T), False),
    "causal": ((B, H, S, D), (B, H, T, D), None, True),
    "three-axes": ((B * H, S, D), (B * H, T, D), None, False),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_of_kernl(name: str) -> None:
    q_shape, k_shape, mask_shape, causal = CALLS[name]
    q, k = draw(*q_shape), draw(*k_shape, seed=1)
    mask = None if mask_shape is None else draw(*mask_shape)
    scores = q @ k.mT * 0.3 + (0.0 if mask is None else mask)
    if causal:
        scores = scores.masked_fill(torch.ones(S, T, dtype=torch.bool).triu(1), -math.inf)
    found = attention_of_kernl(q, k, k, torch.empty_like(q), 0.3, causal, mask)
    close(found, scores.softmax(-1) @ k)


def test_causal_counts_from_the_first_key() -> None:
    """q = k = 0 and v one-hot: exactly the keys up to the row's own number have weight."""
    q, k = torch.zeros(1, 1, S, D, dtype=DOUBLE), torch.zeros(1, 1, T, D, dtype=DOUBLE)
    out = attention_of_kernl(q, k, torch.eye(T, dtype=DOUBLE)[None, None], q, 1.0, True, None)
    assert torch.equal((out != 0)[0, 0], torch.ones(S, T, dtype=torch.bool).tril())


@pytest.fixture
def kernl() -> Iterator[Any]:
    if adapter.source.folder() is None:
        pytest.skip(f"{adapter.source.variable} names no checkout of Kernl")
    with adapter.importable():
        from kernl.optimizer import attention

        yield attention


def old_bert(q, k, mask, v):
    return torch.matmul(functional.softmax(torch.matmul(q, k.transpose(-1, -2)) / 8.0 + mask, dim=-1), v)


def t5(q, k, mask, v):
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += mask
    return torch.matmul(functional.softmax(scores.float(), dim=-1).type_as(scores), v)


def batched(q, k, mask, v):
    return torch.bmm(functional.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)


@pytest.mark.parametrize("function", [old_bert, t5, batched])
def test_kernls_own_patterns(kernl: Any, function: Callable[..., Any]) -> None:
    lead = (B * H,) if function is batched else (B, H)
    q, k, v = (draw(*lead, n, D, seed=i).float() for i, n in enumerate((S, T, T)))
    mask = torch.zeros(B, 1, 1, T)
    mask[1, ..., 4:] = torch.finfo(torch.float32).min
    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        run = adapter.kernls_patterns(gm, inputs)
        seen.extend(node.target for node in gm.graph.nodes)
        return run

    adapter.install()
    try:
        found = torch.compile(function, backend=backend)(q, k, mask, v)
    finally:
        adapter.remove()
    assert attention_of_kernl in seen
    assert functional.softmax not in seen
    close(found, function(q, k, mask, v))


def test_kernls_wrapper_comes_back(kernl: Any) -> None:
    own = kernl.attention_wrapper
    adapter.install()
    adapter.install()
    assert kernl.attention_wrapper is attention_of_kernl
    adapter.remove()
    assert kernl.attention_wrapper is own
