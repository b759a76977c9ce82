"""The kernel for Colossal-AI's loaders against its own and plain attention, then under `ColoAttention`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anyflash.adapters import colossalai as adapter  # noqa: E402
from anyflash.adapters._colossalai.attention import attention  # noqa: E402

DOUBLE = torch.float64
LEAST = torch.finfo(DOUBLE).min
B, H, S, T, D = 3, 2, 6, 9, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=DOUBLE, generator=generator)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 1024 * torch.finfo(wanted.dtype).eps * max(float(wanted.detach().abs().max()), 1.0)
    assert float((found - wanted).detach().abs().max()) <= bound


def plain(q: Any, k: Any, v: Any, mask: Any = None, scale: float | None = None) -> torch.Tensor:
    scores = q @ k.mT * (D**-0.5 if scale is None else scale)
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def trained(run: Callable[..., Any], q: Any, k: Any, v: Any, rows: Any) -> list[torch.Tensor]:
    """What is computed of the rows that are there, and the gradients."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = run(*leaves).transpose(1, 2)[rows]
    return [out, *torch.autograd.grad((out * draw(*out.shape, seed=9)).sum(), leaves)]


def compare(ours: Callable[..., Any], own: Callable[..., Any], rows: Any, keys: int = S) -> None:
    given = draw(B, H, S, D), draw(B, H, keys, D, seed=1), draw(B, H, keys, D, seed=2)
    for mine, wanted in zip(trained(ours, *given, rows), trained(own, *given, rows), strict=True):
        close(mine, wanted)


ALL = torch.ones(B, S, dtype=torch.bool)
# On the left, in the middle, on the right.
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
KEYS_PADDED = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 2 + [1] * 7], dtype=torch.bool)


def bounds(rows: torch.Tensor, keys: torch.Tensor) -> dict[str, Any]:
    """As `ColoAttention.prepare_attn_kwargs` gives them: the same objects where rows and keys are."""
    given: dict[str, Any] = {}
    for name, index, present in (("q", "q_indices", rows), ("kv", "kv_indices", keys)):
        if present is rows and name == "kv":
            given |= {"cu_seqlens_kv": given["cu_seqlens_q"], "kv_indices": given["q_indices"]}
            given["max_seqlen_kv"] = given["max_seqlen_q"]
            continue
        lengths = present.sum(1, dtype=torch.int32)
        given[f"cu_seqlens_{name}"] = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        given[index] = present.flatten().nonzero().flatten()
        given[f"max_seqlen_{name}"] = int(lengths.max())
    return given


def additive(seen: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, T), 0 or the least number."""
    mask = torch.zeros(seen.shape, dtype=DOUBLE).masked_fill(~seen, LEAST)
    return mask.expand(B, 1, *seen.shape[-2:])


def lower(rows: int, keys: int) -> torch.Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril()


EMPTY = torch.empty(0, dtype=DOUBLE)
# How it is called, the mask that it means, the rows that are there, and the number of keys.
CALLS: dict[str, tuple[dict[str, Any], Any, torch.Tensor, int]] = {
    "none": ({}, None, ALL, S),
    "scale": ({"scale": 0.2}, None, ALL, T),
    "custom": ({"attention_mask": draw(B, 1, S, T)}, draw(B, 1, S, T), ALL, T),
    "causal": ({"attention_mask": additive(lower(S, S)), "is_causal": True}, additive(lower(S, S)), ALL, S),
    "causal-more-keys": ({"attention_mask": EMPTY, "is_causal": True}, additive(lower(S, T)), ALL, T),
    "padded": (
        {"attention_mask": EMPTY} | bounds(PADDED, PADDED),
        additive(PADDED[:, None, None]),
        PADDED,
        S,
    ),
    "padded-causal": (
        {"attention_mask": EMPTY, "is_causal": True} | bounds(PADDED, PADDED),
        additive(PADDED[:, None, None] & lower(S, S)),
        PADDED,
        S,
    ),
    "padded-apart": (
        {"attention_mask": EMPTY} | bounds(PADDED, KEYS_PADDED),
        additive(KEYS_PADDED[:, None, None].expand(B, 1, S, T)),
        PADDED,
        T,
    ),
    "padded-apart-causal": (
        {"attention_mask": EMPTY, "is_causal": True} | bounds(ALL, KEYS_PADDED),
        additive(KEYS_PADDED[:, None, None] & lower(S, T)),
        # The last entry's first rows see no key.
        ALL & torch.tensor([[0], [0], [2]]).le(torch.arange(S)),
        T,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_kernel(name: str) -> None:
    call, mask, rows, keys = CALLS[name]
    compare(
        lambda q, k, v: attention(q, k, v, **call),
        lambda q, k, v: plain(q, k, v, mask, call.get("scale")),
        rows,
        keys,
    )


def test_padding_is_zero() -> None:
    out = attention(*draw(3, B, H, S, D).unbind(0), **bounds(PADDED, PADDED))
    assert (out.transpose(1, 2)[~PADDED] == 0).all()


def test_one_row_sees_all() -> None:
    """As a decoding step: Colossal-AI's causal mask of one row hides nothing."""
    q, k = draw(B, H, 1, D), draw(B, H, T, D)
    close(attention(q, k, k, attention_mask=EMPTY, is_causal=True), plain(q, k, k))


def test_causal_counts_from_the_first_key() -> None:
    """q = k = 0 and v one-hot: exactly the keys up to the row's own number have weight."""
    zeros, values = torch.zeros(1, 1, S, T, dtype=DOUBLE), torch.eye(T, dtype=DOUBLE)[None, None]
    out = attention(zeros, torch.zeros_like(values), values, attention_mask=EMPTY, is_causal=True)
    assert torch.equal((out != 0)[0, 0], lower(S, T))


def test_gradient_of_a_mask() -> None:
    q, mask = draw(B, H, S, D), draw(B, 1, S, S).requires_grad_()
    found, wanted = (
        run(q, q, q, attention_mask=mask)
        for run in (attention, lambda q, k, v, attention_mask: plain(q, k, v, attention_mask))
    )
    close(*(torch.autograd.grad(each.square().sum(), mask)[0] for each in (found, wanted)))


def test_dropout() -> None:
    q, k = draw(B, H, S, D), draw(B, H, T, D)
    out = attention(q, k, torch.eye(T, dtype=DOUBLE).expand(B, H, T, T), dropout_p=0.25) * 0.75
    weights = plain(q, k, torch.eye(T, dtype=DOUBLE))
    assert 0.5 < (out != 0).double().mean() < 0.95
    close(torch.where(out != 0, out, weights), weights)


@pytest.fixture
def system() -> Iterator[Any]:
    """Colossal-AI's module of attention, ours installed; kernels for float64 are those for float32."""
    if adapter.source.folder() is None:
        pytest.skip(f"{adapter.source.variable} names no checkout of Colossal-AI")
    pytest.importorskip("einops")
    if torch.cuda.is_available():
        pytest.skip("on a GPU Colossal-AI's own kernels stay")
    with adapter.importable():
        from colossalai.shardformer.layer import attn

        adapter.install()
        try:
            attn.ColoAttention._init_kernels_dispatch()
            kernels = attn.ColoAttention._kernel_dispatch_map
            kernels[DOUBLE] = kernels[torch.float32]
            yield attn
        finally:
            adapter.remove()


def their_kernel() -> Callable[..., Any]:
    """Of Colossal-AI's extensions the one that runs anywhere once it is loaded."""
    from colossalai.kernel.extensions import FlashAttentionSdpaCudaExtension

    return FlashAttentionSdpaCudaExtension().load()


PREPARED: dict[str, tuple[dict[str, Any], torch.Tensor, int]] = {
    "nothing": ({}, ALL, S),
    "causal": ({"is_causal": True}, ALL, S),
    "padded": ({"q_padding_mask": PADDED.long()}, PADDED, S),
    "padded-causal": ({"q_padding_mask": PADDED.long(), "is_causal": True}, PADDED, S),
    "cross": ({"q_padding_mask": PADDED.long(), "kv_padding_mask": KEYS_PADDED.long()}, PADDED, T),
}


# Above this size of a mask Colossal-AI prepares an empty one; without `is_causal` it fails there by itself.
ROOMS = [(name, math.inf) for name in PREPARED] + [("causal", 0.0), ("padded-causal", 0.0)]


@pytest.mark.parametrize(("name", "room"), ROOMS)
def test_colo_attention(system: Any, monkeypatch: pytest.MonkeyPatch, name: str, room: float) -> None:
    """What Colossal-AI prepares for every kind of mask."""
    settings, rows, keys = PREPARED[name]
    shape = (B, 1, S, keys)
    theirs = system.ColoAttention.prepare_attn_kwargs(shape, DOUBLE, torch.device("cpu"), **settings)
    monkeypatch.setattr(system, "MEMORY_BOUND", room)
    ours = system.ColoAttention.prepare_attn_kwargs(shape, DOUBLE, torch.device("cpu"), **settings)
    mask = theirs.get("attention_mask")
    compare(
        lambda q, k, v: system.ColoAttention.attention(q, k, v, **ours),
        lambda q, k, v: their_kernel()(q, k, v, attention_mask=mask),
        rows,
        keys,
    )


def test_custom_mask(system: Any) -> None:
    seen = torch.ones(B, S, S, dtype=DOUBLE)
    seen[0, :, 4:] = 0
    mask = system.invert_mask(seen).unsqueeze(1)
    compare(
        lambda q, k, v: system.ColoAttention.attention(q, k, v, attention_mask=mask),
        lambda q, k, v: their_kernel()(q, k, v, attention_mask=mask),
        ALL,
    )


def test_remove_undoes_install(system: Any) -> None:
    from colossalai.kernel import kernel_loader

    adapter.remove()
    system.ColoAttention._init_kernels_dispatch()
    loaded = [getattr(system.ColoAttention, each) for each in adapter._LOADED]
    registries = [list(getattr(kernel_loader, each).REGISTRY) for each in adapter._LOADERS]
    with pytest.raises(AssertionError, match="No usable kernel found"):
        system.ColoAttention.attention(*draw(3, B, H, S, D).float().unbind(0))
    adapter.install()
    adapter.install()
    grown = [list(getattr(kernel_loader, each).REGISTRY) for each in adapter._LOADERS]
    assert [len(each) for each in grown] == [len(each) + 1 for each in registries]
    close(
        system.ColoAttention.attention(*draw(3, B, H, S, D).float().unbind(0)),
        plain(*draw(3, B, H, S, D).float().unbind(0)),
    )
    adapter.remove()
    assert [list(getattr(kernel_loader, each).REGISTRY) for each in adapter._LOADERS] == registries
    assert all(
        getattr(system.ColoAttention, n) is each for n, each in zip(adapter._LOADED, loaded, strict=True)
    )
    adapter.remove()
    assert adapter.self_check() is None
    assert [list(getattr(kernel_loader, each).REGISTRY) for each in adapter._LOADERS] == registries
