"""Uni-Fold and Uni-Core: by their members, and their own modules where ANYFLASH_SRC_UNIFOLD and
ANYFLASH_SRC_UNICORE name checkouts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from adapters.tiny import close as within_rounding  # noqa: E402
from adapters.tiny import jittered  # noqa: E402
from anyflash.adapters import unifold as adapter  # noqa: E402
from anyflash.adapters._unifold import attention as ours  # noqa: E402

DOUBLE = torch.float64


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 256 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


def gradients(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out.square().sum(), leaves))


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DOUBLE, requires_grad=True)


# Of x, of the mask and of the pair bias, as Uni-Fold hands them over.
CALLS = {
    "row": ((1, 5, 7, 16), (1, 5, 1, 1, 7), (1, 1, 2, 7, 7)),
    "triangle": ((1, 7, 7, 16), (1, 7, 1, 1, 7), (1, 1, 2, 7, 7)),
    "column": ((1, 7, 5, 16), (1, 7, 1, 1, 5), None),
    "several-entries": ((2, 5, 7, 16), (2, 5, 1, 1, 7), (2, 1, 2, 7, 7)),
    "chunk": ((3, 7, 16), (3, 1, 1, 7), (1, 2, 7, 7)),
    "templates": ((1, 2, 7, 7, 16), (1, 2, 7, 1, 1, 7), (1, 2, 1, 2, 7, 7)),
    "plain": ((1, 5, 7, 16), None, None),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_members(name: str, gated: bool) -> None:
    """Outputs and every gradient, that of the pair bias included; one whole row is masked, finitely."""
    torch.manual_seed(0)
    shape, of_mask, of_pair = CALLS[name]
    maps = {f"linear_{n}": torch.nn.Linear(16, 16, bias=n == "g", dtype=DOUBLE) for n in "qkvgo"}
    layer = SimpleNamespace(num_heads=2, norm=8**-0.5, **maps)
    if not gated:
        layer.linear_g = None
    x = leaf(*shape)
    pair = None if of_pair is None else leaf(*of_pair)
    mask = None
    if of_mask is not None:
        mask = torch.zeros(of_mask, dtype=DOUBLE)
        mask[..., -2:] = -3e4
        mask[(0,) * (mask.ndim - 1)] = -3e4
    q, k, v = (maps[f"linear_{n}"](x).unflatten(-1, (2, 8)).transpose(-2, -3) for n in "qkv")
    scores = q @ k.mT * 8**-0.5
    for bias in (mask, pair):
        scores = scores if bias is None else scores + bias
    inner = (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)
    wanted = (maps["linear_g"](x).sigmoid() * inner if gated else inner) @ maps["linear_o"].weight.T
    found = ours.attention(layer, x, x, x, mask, pair)
    close(found, wanted)
    leaves = [t for t in (x, pair) if t is not None]
    for mine, own in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
        close(mine, own)


@pytest.fixture
def unifold() -> Iterator[None]:
    for source in (adapter.source, adapter.core):
        if source.folder() is None:
            pytest.skip(f"{source.variable} names no checkout of {source.package}")
    with adapter.importable():
        yield
        adapter.remove()


def spread(layer: Any) -> Any:
    """In float64, with no layer zero, and training, since Uni-Fold adds in place otherwise."""
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.double().train()


def masked(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uni-Fold's masks of rows and of columns."""
    theirs = importlib.import_module("unifold.modules.attentions")
    return theirs.gen_msa_attn_mask(kept.double(), 3e4)


def row() -> tuple[Any, dict[str, Any], list[torch.Tensor]]:
    theirs = importlib.import_module("unifold.modules.attentions")
    m, z = leaf(1, 5, 7, 16), leaf(1, 7, 7, 12)
    mask, _ = masked(torch.rand(1, 5, 7) > 0.2)
    return theirs.MSARowAttentionWithPairBias(16, 12, 8, 2), {"m": m, "z": z, "attn_mask": mask}, [m, z]


def column() -> tuple[Any, dict[str, Any], list[torch.Tensor]]:
    theirs = importlib.import_module("unifold.modules.attentions")
    m = leaf(1, 5, 7, 16)
    _, mask = masked(torch.rand(1, 5, 7) > 0.2)
    return theirs.MSAColumnAttention(16, 8, 2), {"m": m, "attn_mask": mask}, [m]


def triangle(kind: str) -> tuple[Any, dict[str, Any], list[torch.Tensor]]:
    theirs = importlib.import_module("unifold.modules.attentions")
    x = leaf(1, 7, 7, 16)
    start, end = theirs.gen_tri_attn_mask((torch.rand(1, 7, 7) > 0.2).double(), 3e4)
    mask = start if kind == "Starting" else end
    return getattr(theirs, f"TriangleAttention{kind}")(16, 8, 2), {"x": x, "attn_mask": mask}, [x]


MODULES: dict[str, Callable[[], tuple[Any, dict[str, Any], list[torch.Tensor]]]] = {
    "row": row,
    "column": column,
    "starting": lambda: triangle("Starting"),
    "ending": lambda: triangle("Ending"),
}


@pytest.mark.usefixtures("unifold")
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, chunk_size: int | None) -> None:
    """Its own modules, whole and by its chunks: outputs and gradients."""
    torch.manual_seed(0)
    layer, inputs, leaves = MODULES[name]()
    spread(layer)
    # The bias of the last layer is the caller's.
    used = [p for n, p in layer.named_parameters() if not n.endswith("linear_o.bias")]
    results = []
    for installed in (False, True):
        if installed:
            adapter.install()
        out = layer(**inputs, chunk_size=chunk_size)
        results.append([out, *gradients(out, [*leaves, *used])])
    top = max(float(t.detach().abs().max()) for t in results[0][1:])
    for own, mine in zip(*results, strict=True):
        # What shifts all scores of a row has no effect; its gradient is rounding itself.
        if float(own.detach().abs().max()) > 1e-9 * top:
            close(mine, own)


@pytest.mark.usefixtures("unifold")
@pytest.mark.parametrize("extra", [False, True])
def test_evoformer(extra: bool) -> None:
    """A whole iteration, of the main and of the extra stack."""
    torch.manual_seed(0)
    block = spread(
        importlib.import_module("unifold.modules.evoformer").EvoformerIteration(
            16, 12, 8, 4, 6, 8, 2, 2, 2, 0.0, 0.0, True, 3e4, 1e-5, extra
        )
    )
    m, z = leaf(1, 5, 7, 16), leaf(1, 7, 7, 12)
    kept, pair = (torch.rand(1, 5, 7) > 0.2).double(), (torch.rand(1, 7, 7) > 0.2).double()
    rows, columns = masked(kept)
    triangles = importlib.import_module("unifold.modules.attentions").gen_tri_attn_mask(pair, 3e4)

    def run(layer: Any) -> list[torch.Tensor]:
        outs = layer(m * 1, z * 1, kept, pair, rows, columns, *triangles)
        return [*outs, *torch.autograd.grad(outs[0].square().sum() + outs[1].square().sum(), [m, z])]

    own, moved = run(block), run(jittered(block))
    adapter.install()
    for mine, wanted, other in zip(run(block), own, moved, strict=True):
        within_rounding(mine, wanted, other)
    assert adapter.self_check() is None


@pytest.mark.usefixtures("unifold")
@pytest.mark.parametrize("bias", ["none", "heads", "shared"])
@pytest.mark.parametrize("kind", ["Self", "Cross"])
def test_unicore(kind: str, bias: str) -> None:
    """Uni-Core's layers with padding and a bias a head: outputs and gradients."""
    torch.manual_seed(0)
    layer = getattr(importlib.import_module("unicore.modules"), f"{kind}MultiheadAttention")(16, 2, 0.0)
    spread(layer)
    x, y = leaf(3, 7, 16), leaf(3, 5, 16)
    keys = 7 if kind == "Self" else 5
    padding = torch.arange(keys) >= torch.tensor([keys, 3, 1])[:, None]
    given = {"none": None, "heads": leaf(6, 7, keys), "shared": leaf(1, 7, keys)}[bias]
    leaves = [t for t in (x, None if kind == "Self" else y, given) if t is not None]
    results = []
    for installed in (False, True):
        if installed:
            adapter.install()
        out = layer(*((x,) if kind == "Self" else (x, y, y)), key_padding_mask=padding, attn_bias=given)
        results.append([out, *gradients(out, [*leaves, *layer.parameters()])])
    top = max(float(t.detach().abs().max()) for t in results[0][1:])
    for own, mine in zip(*results, strict=True):
        if float(own.detach().abs().max()) > 1e-9 * top:
            close(mine, own)


@pytest.mark.usefixtures("unifold")
def test_unicore_weights_and_dropout() -> None:
    """Asked for weights, Uni-Core's own attention answers; dropout acts in training only."""
    torch.manual_seed(0)
    layer = spread(importlib.import_module("unicore.modules").SelfMultiheadAttention(16, 2, 0.5))
    x, bias = leaf(3, 7, 16), leaf(6, 7, 7)
    adapter.install()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    out, _, weights = layer(x, attn_bias=bias, return_attn=True)
    assert weights.shape == (6, 7, 7)
    close(layer(x, attn_bias=bias), out)


@pytest.mark.usefixtures("unifold")
def test_remove_undoes_install() -> None:
    core = importlib.import_module("unicore.modules")
    classes = [
        importlib.import_module("unifold.modules.attentions").Attention,
        core.SelfMultiheadAttention,
        core.CrossMultiheadAttention,
    ]
    before = [c.forward for c in classes]
    adapter.install()
    adapter.install()
    assert all(c.forward is not own for c, own in zip(classes, before, strict=True))
    adapter.remove()
    assert [c.forward for c in classes] == before
    adapter.remove()
    assert adapter.self_check() is None
    assert [c.forward for c in classes] == before
