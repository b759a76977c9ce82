"""`scaled_dot_product_attention` is ours inside `use()`, torch's outside, and means the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from anyflash.adapters import pytorch as adapter  # noqa: E402

B, H, D = 2, 4, 8


@dataclass(frozen=True)
class Call:
    """Shapes of q, k and v, and keyword arguments; a mask is given by its dtype and shape."""

    id: str
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...] = ()
    mask: tuple[Any, tuple[int, ...]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    def arrays(self) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        shapes = (self.q, self.k, self.v or self.k)
        qkv = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
        if self.mask is None:
            return qkv, None
        dtype, shape = self.mask
        values = torch.randn(shape, dtype=torch.float64, generator=generator)
        if dtype is not torch.bool:
            return qkv, values.requires_grad_()
        keep = values > 0
        keep[..., 0] = True
        return qkv, keep


CALLS = [
    Call("plain", (B, H, 9, D), (B, H, 9, D)),
    Call("causal", (B, H, 9, D), (B, H, 9, D), arguments={"is_causal": True}),
    Call("causal-more-keys", (B, H, 5, D), (B, H, 9, D), arguments={"is_causal": True}),
    Call("causal-more-queries", (B, H, 9, D), (B, H, 5, D), arguments={"is_causal": True}),
    Call("scale", (B, H, 9, D), (B, H, 7, D), arguments={"scale": 0.3}),
    Call("wider-values", (B, H, 9, D), (B, H, 7, D), (B, H, 7, 12)),
    Call("bool-2d", (B, H, 9, D), (B, H, 7, D), mask=(torch.bool, (9, 7))),
    Call("bool-keys", (B, H, 9, D), (B, H, 7, D), mask=(torch.bool, (B, 1, 1, 7))),
    Call("additive", (B, H, 9, D), (B, H, 7, D), mask=(torch.float64, (H, 9, 7))),
    Call("grouped", (B, H, 9, D), (B, 2, 7, D), arguments={"enable_gqa": True}),
    Call("three-axes", (H, 9, D), (H, 7, D)),
    Call("two-axes", (9, D), (7, D)),
    Call("five-axes", (B, 3, H, 9, D), (B, 3, H, 7, D)),
    Call("five-axes-mask", (B, 3, H, 9, D), (B, 3, H, 7, D), mask=(torch.bool, (B, 3, 1, 9, 7))),
    Call("broadcast-batch", (B, H, 9, D), (1, H, 7, D)),
    Call("broadcast-heads", (B, H, 9, D), (B, 1, 7, D)),
    Call("five-axes-broadcast-mask", (B, 3, H, 9, D), (B, 3, H, 7, D), mask=(torch.bool, (9, 7))),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.id)
def test_call(call: Call) -> None:
    found = []
    for ours in (False, True):
        qkv, mask = call.arrays()
        with adapter.use() if ours else sdpa_kernel(SDPBackend.MATH):
            out = functional.scaled_dot_product_attention(*qkv, attn_mask=mask, **call.arguments)
        out.square().sum().backward()
        inputs = [*qkv, mask] if mask is not None and mask.requires_grad else qkv
        found.append([out.detach(), *(t.grad for t in inputs)])
    for own, mine in zip(*found, strict=True):
        assert mine.shape == own.shape
        assert float((mine - own).abs().max()) <= 256 * torch.finfo(torch.float64).eps * float(
            own.abs().max()
        )


def test_no_key() -> None:
    q = torch.randn(1, 1, 3, D)
    keep = torch.ones(3, 3, dtype=torch.bool)
    keep[1] = False
    with adapter.use():
        out = functional.scaled_dot_product_attention(q, q, q, attn_mask=keep)
    assert not out[0, 0, 1].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("keys", [9, 12])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_causal_and_mask(keys: int, dtype: torch.dtype) -> None:
    """torch's fused CPU attention takes both, and means both."""
    (q, k, v), mask = Call("", (B, H, 9, D), (B, H, keys, D), mask=(dtype, (B, 1, 9, keys))).arrays()
    assert mask is not None
    below = torch.ones(9, keys, dtype=torch.bool).tril()
    both = mask & below if dtype is torch.bool else mask.masked_fill(~below, float("-inf"))
    own = functional.scaled_dot_product_attention(q, k, v, attn_mask=both)
    with adapter.use():
        ours = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True)
    bound = 64 * torch.finfo(torch.float64).eps * float(own.detach().abs().max())
    assert float((ours - own).detach().abs().max()) <= bound


def test_everything_is_put_back() -> None:
    own = functional.scaled_dot_product_attention
    fast_path = torch.backends.mha.get_fastpath_enabled()

    def fail_inside() -> None:
        with adapter.use():
            assert functional.scaled_dot_product_attention is not own
            assert not torch.backends.mha.get_fastpath_enabled()
            with adapter.use():
                pass
            assert functional.scaled_dot_product_attention is not own
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert functional.scaled_dot_product_attention is own
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    adapter.remove()
    assert functional.scaled_dot_product_attention is own


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_transformer(training: bool, padded: bool) -> None:
    """nn.Transformer, its three kinds of attention, in training and in the fused inference path."""
    torch.manual_seed(0)
    model = torch.nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    model.train(training)
    source, target = (torch.randn(B, n, 16, dtype=torch.float64) for n in (9, 5))
    ignored = torch.arange(9)[None] >= torch.tensor([9, 6])[:, None] if padded else None
    causal = model.generate_square_subsequent_mask(5, dtype=torch.float64)
    arguments = {"tgt_mask": causal, "src_key_padding_mask": ignored, "memory_key_padding_mask": ignored}
    with torch.set_grad_enabled(training):
        own = model(source, target, **arguments)
        with adapter.use():
            ours = model(source, target, **arguments)
    bound = 256 * torch.finfo(torch.float64).eps * float(own.detach().abs().max())
    assert float((ours - own).detach().abs().max()) <= bound


@pytest.mark.slow
def test_compiled() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 7, 16)
    with adapter.use():
        found = torch.compile(layer, fullgraph=True)(x)
        own = layer(x)
    bound = 16 * torch.finfo(torch.float32).eps * float(own.detach().abs().max())
    assert float((found - own).detach().abs().max()) <= bound


def test_self_check() -> None:
    assert adapter.self_check() is None
