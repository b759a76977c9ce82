"""`memory_efficient_attention` with every bias class, against that class's own `materialize`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("xformers", reason="`make test` installs it where it can")

from xformers.ops import fmha  # noqa: E402
from xformers.ops.fmha import attn_bias as biases  # noqa: E402
from xformers.ops.fmha import dispatch  # noqa: E402

from anyflash.adapters import xformers as adapter  # noqa: E402
from anyflash.core.errors import Unsupported  # noqa: E402

B, H, K = 2, 4, 8
DOUBLE = torch.float64


@pytest.fixture
def installed() -> Iterator[None]:
    adapter.install()
    yield
    adapter.remove()


@dataclass(frozen=True)
class Case:
    """A bias, the rows and keys it is for, and whether sequences are packed (then the batch is 1)."""

    make: Callable[[], Any]
    rows: int
    keys: int
    packed: bool = True
    name: str = ""

    @property
    def id(self) -> str:
        return self.name or type(self.make()).__name__


Q, KV, STARTS = [3, 2, 4], [5, 2, 6], [0, 7, 11, 18]
TABLE = torch.tensor([[3, 0], [1, 4], [5, 2]], dtype=torch.int32)


def of(kind: Any, *args: Any, **keywords: Any) -> Callable[[], Any]:
    return lambda: kind.from_seqlens(*args, **keywords)


def local(kind: Any, **keywords: Any) -> Callable[[], Any]:
    return lambda: kind.from_seqlens_local(Q, 7, KV, **keywords)


def paged_gaps(kind: Any) -> Callable[[], Any]:
    """By way of gaps: this class's own `from_seqlens` contradicts itself and always raises."""
    gaps = lambda: biases.BlockDiagonalGappyKeysMask.from_seqlens(Q, [1, 8, 18, 24], KV)
    return lambda: gaps().make_paged(TABLE, 4, 8, kind)


def blocks(kind: Any, q: list[int], k: list[int]) -> Callable[[], Any]:
    """xformers makes the local ones from others."""
    return lambda: kind(
        q_seqinfo=biases._SeqLenInfo.from_seqlens(q),
        k_seqinfo=biases._SeqLenInfo.from_seqlens(k),
        _window_size=2,
    )


CASES = [
    Case(lambda: None, 9, 12, False, "none"),
    Case(lambda: torch.randn(B, H, 9, 12, dtype=DOUBLE), 9, 12, False),
    Case(biases.LowerTriangularMask, 9, 12, False),
    Case(
        lambda: biases.LowerTriangularMaskWithTensorBias(torch.randn(B, H, 9, 12, dtype=DOUBLE)), 9, 12, False
    ),
    Case(biases.LowerTriangularFromBottomRightMask, 9, 12, False),
    Case(lambda: biases.LowerTriangularFromBottomRightLocalAttentionMask(3), 9, 12, False),
    Case(lambda: biases.LocalAttentionFromBottomRightMask(2, 1), 9, 12, False),
    Case(of(biases.BlockDiagonalMask, Q, KV), 9, 13),
    Case(of(biases.BlockDiagonalCausalMask, Q, KV), 9, 13),
    Case(of(biases.BlockDiagonalCausalFromBottomRightMask, Q, KV), 9, 13),
    Case(blocks(biases.BlockDiagonalCausalLocalAttentionMask, Q, KV), 9, 13),
    Case(blocks(biases.BlockDiagonalCausalLocalAttentionFromBottomRightMask, Q, KV), 9, 13),
    Case(of(biases.BlockDiagonalPaddedKeysMask, Q, 7, KV), 9, 21),
    Case(of(biases.BlockDiagonalCausalWithOffsetPaddedKeysMask, Q, 7, KV), 9, 21),
    Case(local(biases.BlockDiagonalLocalAttentionPaddedKeysMask, window_left=2, window_right=1), 9, 21),
    Case(local(biases.BlockDiagonalCausalLocalAttentionPaddedKeysMask, window_size=2), 9, 21),
    Case(of(biases.BlockDiagonalGappyKeysMask, Q, STARTS, KV), 9, 18),
    Case(of(biases.BlockDiagonalCausalWithOffsetGappyKeysMask, Q, STARTS, KV), 9, 18),
    Case(of(biases.PagedBlockDiagonalPaddedKeysMask, Q, KV, TABLE, 4), 9, 24),
    Case(of(biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask, Q, KV, TABLE, 4), 9, 24),
    Case(paged_gaps(biases.PagedBlockDiagonalGappyKeysMask), 9, 24),
    Case(paged_gaps(biases.PagedBlockDiagonalCausalWithOffsetGappyKeysMask), 9, 24),
]


def mask_of(bias: Any, heads: int, rows: int, keys: int) -> torch.Tensor:
    """Additive, as the class itself says it."""
    if bias is None or isinstance(bias, torch.Tensor):
        return torch.zeros(1, dtype=DOUBLE) if bias is None else bias
    return bias.materialize((1, heads, rows, keys), dtype=DOUBLE)


def plain(q: Any, k: Any, v: Any, mask: torch.Tensor, scale: float) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + mask
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(0.0), v)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 256 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


def test_every_bias_class_has_a_case() -> None:
    classes = {
        c for _, c in inspect.getmembers(biases, inspect.isclass) if issubclass(c, biases.AttentionBias)
    }
    assert {type(c.make()) for c in CASES} >= classes - {biases.AttentionBias}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_bias(case: Case) -> None:
    """Forward and gradients by `op=None`, in float64; values wider than keys."""
    torch.manual_seed(0)
    batch = 1 if case.packed else B
    q = torch.randn(batch, case.rows, H, K, dtype=DOUBLE, requires_grad=True)
    k = torch.randn(batch, case.keys, H, K, dtype=DOUBLE, requires_grad=True)
    v = torch.randn(batch, case.keys, H, K + 3, dtype=DOUBLE, requires_grad=True)
    bias = case.make()
    inputs = [q, k, v]
    if isinstance(bias, torch.Tensor):
        inputs.append(bias.requires_grad_())
    mask = mask_of(bias, H, case.rows, case.keys)
    wanted = plain(q, k, v, mask, 0.3)
    found = fmha.memory_efficient_attention(q, k, v, attn_bias=bias, scale=0.3)
    close(found, wanted)
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in (found, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        close(mine, theirs)
    with torch.no_grad():
        close(fmha.memory_efficient_attention_forward(q, k, v, attn_bias=bias, scale=0.3), wanted)
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias=bias, scale=0.3)
        assert lse.shape == (batch, H, case.rows)
        if not isinstance(bias, (torch.Tensor, biases.LowerTriangularMaskWithTensorBias)):
            again = fmha.memory_efficient_attention_backward(
                2 * out, out, lse, q, k, v, attn_bias=bias, scale=0.3
            )
            for mine, theirs in zip(again, gradients[1], strict=True):
                close(mine, theirs)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("packed", [False, True])
def test_groups(packed: bool) -> None:
    """(B, M, G, H, K), keys shared by a group's heads by stride 0: xformers has it without gradients only."""
    torch.manual_seed(0)
    batch = 1 if packed else B
    q = torch.randn(batch, 9, 2, 3, K, dtype=DOUBLE)
    k, v = (torch.randn(batch, 13, 2, 1, K, dtype=DOUBLE).expand(-1, -1, -1, 3, -1) for _ in range(2))
    bias = biases.BlockDiagonalMask.from_seqlens(Q, KV) if packed else None
    wanted = plain(*(t.flatten(2, 3) for t in (q, k, v)), mask_of(bias, 6, 9, 13), K**-0.5)
    close(fmha.memory_efficient_attention(q, k, v, attn_bias=bias), wanted.unflatten(2, (2, 3)))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias=bias)
    close(out, wanted.unflatten(2, (2, 3)))
    assert lse.shape == (batch, 2, 3, 9)
    with pytest.raises(NotImplementedError, match="BMGHK"):
        fmha.memory_efficient_attention(q.requires_grad_(), k, v, attn_bias=bias)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_and_one_head(dtype: torch.dtype) -> None:
    """(B, M, K) in each type: at most twice the error of the scores formed in that type."""
    torch.manual_seed(0)
    q = torch.randn(B, 9, K).to(dtype).requires_grad_()
    found = fmha.memory_efficient_attention(q, q, q)
    heads = q.unsqueeze(2)
    own = plain(heads, heads, heads, torch.zeros(1, dtype=dtype), K**-0.5).squeeze(2)
    exact = plain(*(heads.double(),) * 3, torch.zeros(1, dtype=DOUBLE), K**-0.5).squeeze(2)
    error, allowed = (float((t.double() - exact).detach().abs().max()) for t in (found, own))
    assert found.dtype == dtype
    assert error <= 2 * allowed + torch.finfo(dtype).eps
    found.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.usefixtures("installed")
def test_partial() -> None:
    """Two halves of the keys, each with its lse, make the whole."""
    torch.manual_seed(0)
    q, k = torch.randn(B, 9, H, K), torch.randn(B, 12, H, K)
    parts = [fmha.memory_efficient_attention_partial(q, half, half) for half in (k[:, :5], k[:, 5:])]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(-1, -2)[..., None]
    whole = sum(w * out for w, (out, _) in zip(weights, parts, strict=True))
    close(whole, fmha.memory_efficient_attention(q, k, k))


def test_operators_by_name() -> None:
    """`op=` needs no `install`; without either xformers says that it has nothing for a CPU."""
    x = torch.randn(1, 9, H, K, requires_grad=True)
    with pytest.raises(NotImplementedError, match="No operator found"):
        fmha.memory_efficient_attention(x, x, x)
    out = fmha.memory_efficient_attention(x, x, x, op=adapter.operators())
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_dropout() -> None:
    """The backward drops what the forward dropped: the function of v is linear, so its gradient is exact."""
    torch.manual_seed(0)
    q = torch.randn(1, 9, H, K, dtype=DOUBLE)
    v = torch.randn(1, 9, H, K, dtype=DOUBLE, requires_grad=True)
    torch.manual_seed(1)
    out = fmha.memory_efficient_attention(q, q, v, p=0.5, op=adapter.operators())
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weights).sum(), v)
    close((gradient * v).sum(), (out * weights).sum())
    torch.manual_seed(1)
    again = fmha.memory_efficient_attention(q, q, v, p=0.5, op=adapter.operators())
    assert torch.equal(out, again)


def test_a_gradient_that_xformers_would_drop_is_refused() -> None:
    x = torch.randn(1, 9, H, K, requires_grad=True)
    bias = biases.LowerTriangularMaskWithTensorBias(torch.randn(1, H, 9, 9, requires_grad=True))
    with pytest.raises(Unsupported, match="Pass a tensor as attn_bias"):
        fmha.memory_efficient_attention(x, x, x, attn_bias=bias, op=adapter.operators())


def state() -> list[Any]:
    return [dispatch._dispatch_fw_priority_list, dispatch._dispatch_bw, fmha._dispatch_bw]


def test_remove_undoes_install() -> None:
    before = state()
    adapter.install()
    adapter.install()
    assert state() != before
    adapter.remove()
    assert state() == before
    adapter.remove()
    assert adapter.self_check() is None
    assert state() == before
