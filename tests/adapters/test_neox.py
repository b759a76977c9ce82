"""GPT-NeoX: its calls of flash_attn, and its own layers where ANYFLASH_SRC_NEOX names a checkout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import anyflash.compat.flash_attn as flash_attn  # noqa: E402
from anyflash.adapters import neox as adapter  # noqa: E402
from anyflash.adoption.rows import neox as row  # noqa: E402
from anyflash.compat import door  # noqa: E402
from anyflash.compat.flash_attn.ops.activations import swiglu  # noqa: E402

DOUBLE = torch.float64
S, BATCH, HEADS, DIM, LAYERS, VOCABULARY = 12, 2, 4, 8, 2, 32
PROMPTS = [[5, 6, 7], [9, 8, 7]]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 256 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


def definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor | None, window: int | None
) -> torch.Tensor:
    """(batch, rows, heads, dim), causal, the last row at the last key."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    masked = distance < 0 if window is None else (distance < 0) | (distance > window)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(masked, -torch.inf).softmax(-1), v)


# Heads of keys; slopes; width of the window; rows. NeoX passes a keyword only where it has something to say.
CALLS = {
    "plain": (4, False, None, S),
    "grouped": (2, False, None, S),
    "one-key-head": (1, False, None, S),
    "alibi": (4, True, None, S),
    "alibi-grouped": (2, True, None, S),
    "window": (4, False, 3, S),
    "cached": (4, False, None, 1),
    "cached-alibi-grouped": (2, True, None, 1),
    "cached-window": (2, False, 3, 1),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CALLS)
def test_call(name: str, training: bool) -> None:
    """As `ParallelSelfAttention.flash_attention` calls, outputs and gradients."""
    heads, alibi, window, rows = CALLS[name]
    torch.manual_seed(0)
    q = torch.randn(BATCH, rows, HEADS, DIM, dtype=DOUBLE, requires_grad=True)
    k, v = (torch.randn(BATCH, S, heads, DIM, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if alibi else None
    extra: dict[str, Any] = {} if slopes is None else {"alibi_slopes": slopes}
    if window is not None:
        extra["window_size"] = (window, -1)
    if training:
        found = flash_attn.flash_attn_func(q, k, v, 0.0, softmax_scale=None, causal=True, **extra)
    else:
        starts = [torch.arange(0, (BATCH + 1) * n, step=n, dtype=torch.int32) for n in (rows, S)]
        flat = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
        # In evaluation NeoX says causal only if there are as many rows as keys.
        packed = flash_attn.flash_attn_varlen_func(
            *flat, *starts, rows, S, softmax_scale=None, causal=rows == S, **extra
        )
        found = packed.reshape(q.shape)
    wanted = definition(q, k, v, slopes, window)
    close(found, wanted)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, wanted)]
    for mine, own in zip(*gradients, strict=True):
        close(mine, own)


def test_absent() -> None:
    # megatron-core has the name of the package too.
    if not (importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.model")):
        assert "megatron" in (adapter.self_check() or "")
        with pytest.raises(ImportError):
            adapter.install()
        assert "flash_attn" not in sys.modules


@pytest.fixture(scope="module")
def neox() -> Iterator[Any]:
    """NeoX's transformer module."""
    if adapter.source.folder() is None:
        pytest.skip(f"{adapter.source.variable} names no checkout of GPT-NeoX")
    pytest.importorskip("deepspeed")
    with row.on_the_cpu():
        yield importlib.import_module(adapter.target.module)


def settings(kind: str, **chosen: Any) -> SimpleNamespace:
    shape = {
        "hidden_size": HEADS * DIM,
        "num_attention_heads": HEADS,
        "num_layers": LAYERS,
        "seq_length": S,
        "max_position_embeddings": S,
        "padded_vocab_size": VOCABULARY,
        "init_method_std": 0.3,
    }
    return row.settings(attention_config=[kind] * LAYERS, **{**shape, **chosen})


def pair(**chosen: Any) -> tuple[Any, Any]:
    """The same model with its own attention, and with ours."""
    networks = [row.model(settings(kind, **chosen)).double() for kind in ("global", "flash")]
    networks[1].load_state_dict(networks[0].state_dict())
    return networks[0], networks[1]


MODELS: dict[str, dict[str, Any]] = {
    "learned": {"pos_emb": "learned"},
    "rotary": {"pos_emb": "rotary"},
    "rotary-in-part": {"pos_emb": "rotary", "rotary_pct": 0.5},
    "rotary-grouped": {"pos_emb": "rotary", "num_kv_heads": 2},
    "rotary-one-key-head": {"pos_emb": "rotary", "num_kv_heads": 1},
    "alibi": {"pos_emb": "alibi"},
    "alibi-grouped": {"pos_emb": "alibi", "num_kv_heads": 2},
    "window": {"pos_emb": "rotary", "sliding_window_width": 3},
    "parallel-residual": {"pos_emb": "rotary", "gpt_j_residual": True, "use_qk_layernorm": True},
}


@pytest.mark.usefixtures("neox", "installed")
@pytest.mark.parametrize("name", MODELS)
def test_training(name: str) -> None:
    """Logits and the gradients of all parameters."""
    own, ours = pair(**MODELS[name])
    mask = importlib.import_module("megatron.utils").get_attn_mask(
        S, "cpu", MODELS[name].get("sliding_window_width")
    )
    ids = torch.randint(VOCABULARY, (BATCH, S), generator=torch.Generator().manual_seed(1))
    results = []
    for network in (own, ours):
        logits = network.train()((ids, torch.arange(S).expand(BATCH, S), mask))
        leaves = dict(network.named_parameters())
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(leaves.values()))])
    for mine, wanted in zip(results[1], results[0], strict=True):
        # A bias of the keys shifts whole rows of scores, to no effect; its gradient is rounding itself.
        if float(wanted.detach().abs().max()) > 1e-9:
            close(mine, wanted)


@pytest.mark.usefixtures("neox", "installed")
@pytest.mark.parametrize("recompute", [False, True], ids=["cache", "recompute"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "window"])
def test_generation(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeoX's own loop, over its cache of keys and values: the same tokens, the same logits.

    Without windows: the loop makes its mask without them.
    """
    monkeypatch.setattr(torch.cuda, "LongTensor", torch.LongTensor)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    loop = importlib.import_module("megatron.text_generation_utils")
    arguments = settings("flash", tokenizer=SimpleNamespace(eod=0))
    results = []
    # Its own attention forms the scores of all tokens anew: its mask does not fit a single row.
    for network, anew in zip(pair(**MODELS[name]), (True, recompute), strict=True):
        network.inference_mode(use_cache=not anew)
        steps: list[torch.Tensor] = []

        def forward(
            given: Any, network: Any = network, anew: bool = anew, steps: list[torch.Tensor] = steps
        ) -> torch.Tensor:
            logits = network(given)
            steps.append(logits[:, len(PROMPTS[0]) - 1 + len(steps) if anew else -1].clone())
            return logits

        served = SimpleNamespace(module=forward, eval=network.eval)
        made = loop.stream_tokens(
            arguments, served, PROMPTS, eos_token_id=-1, maximum_tokens=6, recompute=anew
        )
        *_, (tokens, *_) = made
        results.append((tokens, torch.stack(steps)))
    (wanted_tokens, wanted), (found_tokens, found) = results
    assert torch.equal(found_tokens, wanted_tokens)
    close(found, wanted)


@pytest.fixture
def installed(neox: Any) -> Iterator[None]:
    adapter.install()
    yield
    adapter.remove()


def test_leaves_nothing(neox: Any) -> None:
    before = (neox.swiglu, list(sys.meta_path))
    assert neox.swiglu is not swiglu
    adapter.install()
    adapter.install()
    assert importlib.import_module("flash_attn").flash_attn_func is flash_attn.flash_attn_func
    assert neox.swiglu is swiglu
    assert adapter.self_check() is None
    adapter.remove()
    assert "flash_attn" not in sys.modules
    assert (neox.swiglu, list(sys.meta_path)) == before
    assert adapter.self_check() is None
    assert (neox.swiglu, list(sys.meta_path)) == before


def test_beside_another(neox: Any) -> None:
    """The door is open until all who need it have left."""
    door.hold("another")
    adapter.install()
    adapter.remove()
    importlib.import_module("flash_attn")
    door.release("another")
    assert "flash_attn" not in sys.modules


def test_too_old(neox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neox.ParallelSelfAttention, "flash_attention", lambda self, q, k, v: q)
    with pytest.warns(UserWarning, match="version 1 of flash_attn"):
        adapter.install()
    adapter.remove()
