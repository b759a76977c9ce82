"""MosaicBERT: the calls of its layers, and they themselves where ANYFLASH_SRC_MOSAIC_EXAMPLES is set."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anyflash.adapters import mosaicbert as adapter  # noqa: E402
from anyflash.adapters._mosaicbert.attention import (  # noqa: E402
    Alibi,
    encoder_forward,
    self_attention,
)

DOUBLE = torch.float64
BATCH, S, HEADS, WIDTH = 3, 9, 4, 16
# ALiBi of a power of two of heads: these slopes are exact in float32, in which the encoder keeps them.
SLOPES = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625])

# Which tokens of each entry exist.
MASKS = {
    "all": ["111111111"] * 3,
    "right": ["111111111", "111100000", "110000000"],
    "left": ["111111111", "000001111", "000000011"],
    "holes": ["110111011", "111111111", "011011000"],
    "empty": ["111111111", "000000000", "111000000"],
}


def kept(name: str) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row] for row in MASKS[name]])


def bias_of(mask: torch.Tensor) -> torch.Tensor:
    distance = (torch.arange(S)[:, None] - torch.arange(S)).abs()
    return (1 - mask[:, None, None]) * -10000.0 - SLOPES[:, None, None] * distance


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 512 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


def layer() -> Any:
    torch.manual_seed(0)
    projection = torch.nn.Linear(WIDTH, 3 * WIDTH, dtype=DOUBLE)
    torch.nn.init.normal_(projection.weight, std=0.6)
    return SimpleNamespace(Wqkv=projection, num_attention_heads=HEADS, p_dropout=0.0, training=True)


def packed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, bounds and places, as `unpad_input` gives them."""
    bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    places = mask.flatten().nonzero().flatten()
    torch.manual_seed(1)
    return torch.randn(len(places), WIDTH, dtype=DOUBLE, requires_grad=True), bounds, places


@pytest.mark.parametrize("dense", [True, False], ids=["matrix", "slopes"])
@pytest.mark.parametrize("name", MASKS)
def test_call(name: str, dense: bool) -> None:
    """The padded attention with a bias, computed as MosaicBERT does, and ours on the packed tokens."""
    mask, self = kept(name), layer()
    x, bounds, places = packed(mask)
    bias = bias_of(mask)
    q, k, v = (
        torch.zeros(BATCH * S, 3 * WIDTH, dtype=DOUBLE)
        .index_copy(0, places, self.Wqkv(x))
        .view(BATCH, S, 3, HEADS, WIDTH // HEADS)
        .permute(2, 0, 3, 1, 4)
    )
    attended = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5 + bias).softmax(-1) @ v
    wanted = attended.transpose(1, 2).reshape(BATCH * S, WIDTH)[places]
    given: Any = bias
    if not dense:
        order = None if name != "holes" else (1 - mask).argsort(dim=1, stable=True).to(torch.int32)
        given = Alibi(SLOPES, order)
    found = self_attention(self, x, bounds, S, places, mask, given)
    close(found, wanted)
    leaves = (x, self.Wqkv.weight)
    gradients = (torch.autograd.grad(out.square().sum(), leaves) for out in (found, wanted))
    for mine, own in zip(*gradients, strict=True):
        close(mine, own)


@pytest.mark.parametrize("name", MASKS)
def test_encoder_gives_slopes(name: str) -> None:
    """The encoder's own forward sees no matrix, and its layers get the places of tokens among holes."""
    mask, seen = kept(name), []

    def own(self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> str:
        assert self._current_alibi_size >= 10**6
        assert self.layer == "its own"
        padding = ((1.0 - attention_mask[:, None, None]) * -10000.0)[:, :, :S, :S]
        seen.append(padding + self.alibi.to(hidden_states.device)[:, :, :S, :S])
        return "its result"

    distance = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    encoder = SimpleNamespace(
        alibi=-SLOPES[:, None, None] * distance[None], _current_alibi_size=4, layer="its own"
    )
    encoder.alibi = encoder.alibi[None]
    assert encoder_forward(own)(encoder, torch.zeros(BATCH, S, WIDTH), mask) == "its result"
    (alibi,) = seen
    assert isinstance(alibi, Alibi)
    assert torch.equal(alibi.slopes, SLOPES)
    assert (alibi.places is not None) == (name == "holes")
    assert encoder._current_alibi_size == 4


def test_absent() -> None:
    if adapter.source.folder() is None and importlib.util.find_spec("bert_layers") is None:
        assert "mosaicml/examples" in (adapter.self_check() or "")


@pytest.fixture
def layers() -> Iterator[Any]:
    if adapter.source.folder() is None:
        pytest.skip(f"{adapter.source.variable} names no checkout of mosaicml/examples")
    for needed in ("einops", "transformers"):
        pytest.importorskip(needed)
    with adapter.importable():
        module = importlib.import_module("bert_layers")
        # The kernel it has where Triton is there takes half precision only.
        module.flash_attn_qkvpacked_func = None
        yield module
        adapter.remove()


def encoder(module: Any, heads: int = HEADS, starting: int = 16) -> Any:
    torch.manual_seed(0)
    config = SimpleNamespace(
        hidden_size=WIDTH * heads // HEADS,
        num_attention_heads=heads,
        num_hidden_layers=2,
        intermediate_size=24,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        layer_norm_eps=1e-12,
        alibi_starting_size=starting,
    )
    made = module.BertEncoder(config).double()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return made


# Entries without any token are left out: its own unpadding fails on the batch's last layer for them.
@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("starting", [16, 4, 1])
@pytest.mark.parametrize("name", [n for n in MASKS if n != "empty"])
def test_encoder(layers: Any, name: str, starting: int, subset: bool) -> None:
    """Its own encoder of two layers: outputs and gradients; also rows beyond its matrix of biases."""
    made, mask = encoder(layers, starting=starting), kept(name)
    torch.manual_seed(2)
    x = torch.randn(BATCH, S, WIDTH, dtype=DOUBLE, requires_grad=True)
    chosen = torch.rand(BATCH, S) > 0.5 if subset else None
    results = []
    for ours in (False, True):
        if ours:
            adapter.install()
        out = made(x, mask, output_all_encoded_layers=False, subset_mask=chosen)[-1]
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, *made.parameters()))])
    top = max(float(t.detach().abs().max()) for t in results[0][1:])
    for own, mine in zip(*results, strict=True):
        # The keys' biases shift whole rows before the softmax: their gradient is rounding itself.
        assert float((mine - own).detach().abs().max()) <= 1024 * torch.finfo(DOUBLE).eps * max(
            top, float(own.detach().abs().max())
        )


@pytest.mark.usefixtures("layers")
def test_remove_undoes_install(layers: Any) -> None:
    own = layers.BertEncoder.forward, layers.BertUnpadSelfAttention.forward
    adapter.install()
    adapter.install()
    assert layers.BertEncoder.forward is not own[0]
    assert layers.BertUnpadSelfAttention.forward is not own[1]
    adapter.remove()
    assert (layers.BertEncoder.forward, layers.BertUnpadSelfAttention.forward) == own
    adapter.remove()
    assert adapter.self_check() is None
    assert (layers.BertEncoder.forward, layers.BertUnpadSelfAttention.forward) == own


def test_dropout(layers: Any) -> None:
    """Probabilities are dropped in training only, and scaled up."""
    made = encoder(layers).train()
    for block in made.layer:
        block.attention.self.p_dropout = 0.3
    x, mask = torch.randn(BATCH, S, WIDTH, dtype=DOUBLE), kept("right")
    adapter.install()
    torch.manual_seed(3)
    first = made(x, mask)[-1]
    torch.manual_seed(3)
    assert torch.equal(made(x, mask)[-1], first)
    assert not torch.equal(made(x, mask)[-1], first)
    made.eval()
    assert torch.equal(made(x, mask)[-1], made(x, mask)[-1])
