"""Below and beside `scaled_dot_product_attention`: torch's registry, its operators, varlen_attn and flex."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn import attention as torchs  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.flex_attention import AuxRequest as FlexAux  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention as torchs_flex  # noqa: E402
from torch.nn.attention.varlen import AuxRequest, varlen_attn, varlen_attn_out  # noqa: E402

import anyflash  # noqa: E402
from anyflash.adapters import pytorch as adapter  # noqa: E402
from anyflash.adapters._torch.symbols import NotTraceable  # noqa: E402
from anyflash.core.errors import InvalidCall, Unsupported  # noqa: E402

B, H, D = 2, 4, 8
# Kept from before anything was replaced, as a module does that imports the function by name.
BY_NAME = functional.scaled_dot_product_attention


@pytest.fixture
def active() -> Iterator[None]:
    with adapter.use():
        yield


def arrays(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def close(found: torch.Tensor, wanted: torch.Tensor, roundings: int = 256) -> None:
    assert found.shape == wanted.shape
    bound = roundings * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


def test_registry() -> None:
    adapter.register()
    assert adapter.IMPLEMENTATION in torchs.list_flash_attention_impls()
    anyflash.torch.activate()
    try:
        assert torchs.current_flash_attention_impl() == adapter.IMPLEMENTATION
        assert functional.scaled_dot_product_attention is not BY_NAME
    finally:
        anyflash.torch.deactivate()
    assert torchs.current_flash_attention_impl() is None
    torchs.activate_flash_attention_impl(adapter.IMPLEMENTATION)
    assert functional.scaled_dot_product_attention is not BY_NAME
    torchs.restore_flash_attention_impl()
    assert functional.scaled_dot_product_attention is BY_NAME


def test_another_implementation_comes_back() -> None:
    class Handle:
        def remove(self) -> None: ...

    torchs.register_flash_attention_impl("another", register_fn=Handle)
    torchs.activate_flash_attention_impl("another")
    try:
        with adapter.use():
            assert torchs.current_flash_attention_impl() == adapter.IMPLEMENTATION
        assert torchs.current_flash_attention_impl() == "another"
        adapter.install()
        torchs.activate_flash_attention_impl("another")
        assert functional.scaled_dot_product_attention is BY_NAME
    finally:
        torchs.restore_flash_attention_impl()
        torchs._registry._FLASH_ATTENTION_IMPLS.pop("another")


OPERATOR = [
    ("plain", (B, H, 9, D), (B, H, 12, D), None, {}),
    ("causal", (B, H, 9, D), (B, H, 12, D), None, {"is_causal": True}),
    ("bool", (B, H, 9, D), (B, H, 12, D), (torch.bool, (9, 12)), {}),
    ("additive", (B, H, 9, D), (B, H, 12, D), (torch.float64, (B, 1, 9, 12)), {"scale": 0.2}),
    ("grouped", (B, H, 9, D), (B, 2, 12, D), None, {"enable_gqa": True}),
]


@pytest.mark.parametrize(
    ("q", "k", "mask", "arguments"), [c[1:] for c in OPERATOR], ids=[c[0] for c in OPERATOR]
)
def test_operators_below(q: Any, k: Any, mask: Any, arguments: dict[str, Any]) -> None:
    """The function that was imported by name reaches the operators, which reproduce shapes and strides."""

    def run() -> list[torch.Tensor]:
        qkv = arrays(q, k, k)
        given = None
        if mask is not None:
            given = arrays(mask[1])[0].detach()
            given = given > -1 if mask[0] is torch.bool else given
        out = BY_NAME(*qkv, attn_mask=given, **arguments)
        out.square().sum().backward()
        return [out.detach(), *(t.grad for t in qkv)]

    own = run()
    with adapter.use():
        ours = run()
    assert not all(torch.equal(a, b) for a, b in zip(own, ours, strict=True)), "ours did not run"
    for mine, theirs in zip(ours, own, strict=True):
        close(mine, theirs)
        assert mine.stride() == theirs.stride()
    again = run()
    assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True)), "torch's kernel is not back"


LENGTHS = ((4, 0, 6), (5, 3, 7))


def bounds(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("heads", [H, 2])
def test_varlen(window: tuple[int, int], heads: int) -> None:
    q, k, v = arrays((10, H, D), (15, heads, D), (15, heads, D))
    cu_q, cu_k = map(bounds, LENGTHS)
    out, lse = varlen_attn(
        q, k, v, cu_q, cu_k, 6, 7, window_size=window, enable_gqa=heads != H, return_aux=AuxRequest(lse=True)
    )
    found = [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
    parts, lses = [], []
    for i in range(3):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        i_q = torch.arange(LENGTHS[0][i])[:, None] + LENGTHS[1][i] - LENGTHS[0][i]
        i_k = torch.arange(LENGTHS[1][i])
        seen = (window[0] < 0) | (i_k >= i_q - window[0])
        seen = seen & ((window[1] < 0) | (i_k <= i_q + window[1]))
        repeat = H // heads
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys].repeat_interleave(repeat, 1)) * D**-0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        lses.append(scores.logsumexp(-1))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys].repeat_interleave(repeat, 1)))
    wanted = torch.cat(parts)
    for mine, theirs in zip(
        found, [wanted, *torch.autograd.grad(wanted.square().sum(), (q, k, v))], strict=True
    ):
        close(mine, theirs)
    close(lse, torch.cat(lses, -1))
    into = torch.empty_like(out)
    with torch.no_grad():
        varlen_attn_out(into, q, k, v, cu_q, cu_k, 6, 7, window_size=window, enable_gqa=heads != H)
    assert torch.equal(into, out)


@pytest.mark.usefixtures("active")
def test_varlen_over_pages() -> None:
    q, pool_k, pool_v = (t.detach() for t in arrays((5, H, D), (6, 4, H, D), (6, 4, H, D)))
    table = torch.tensor([[3, 1], [5, 0]], dtype=torch.int32)
    used = torch.tensor([7, 3], dtype=torch.int32)
    found = varlen_attn(
        q, pool_k, pool_v, bounds((2, 3)), None, 3, 8, window_size=(-1, 0), seqused_k=used, block_table=table
    )
    k, v = (pool[table.long()].flatten(1, 2) for pool in (pool_k, pool_v))
    for i, (rows, n) in enumerate([(slice(0, 2), 7), (slice(2, 5), 3)]):
        own = anyflash.attention(q[rows][None], k[i : i + 1, :n], v[i : i + 1, :n], causal=True)
        close(found[rows], own[0])


def test_stock_varlen_has_no_kernel_here() -> None:
    """If this fails, torch has gained one: then the page of systems says too little."""
    q = torch.randn(4, H, D)
    with pytest.raises(NotImplementedError):
        varlen_attn(q, q, q, bounds((4,)), bounds((4,)), 4, 4)


@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(masked: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(16, H, batch_first=True, dtype=torch.float64)
    (x,) = arrays((B, 9, 16))
    ignored = torch.arange(9)[None] >= torch.tensor([9, 5])[:, None] if masked else None
    found = []
    for ours in (False, True):
        with adapter.use() if ours else sdpa_kernel(SDPBackend.MATH):
            out, weights = layer(x, x, x, key_padding_mask=ignored, need_weights=False)
        assert weights is None
        found.append([out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))])
    for own, mine in zip(*found, strict=True):
        close(mine, own)


@pytest.mark.usefixtures("active")
def test_dropout_is_torchs_generators() -> None:
    q, k, v = (t.detach() for t in arrays((B, H, 9, D), (B, H, 9, D), (B, H, 9, D), dtype=torch.float32))
    call = lambda: functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    first, other = call(), call()
    torch.manual_seed(1)
    assert torch.equal(first, call())
    assert not torch.equal(first, other)


@pytest.mark.usefixtures("active")
def test_vmap_and_func_grad() -> None:
    q, k, v = (t.detach() for t in arrays((3, B, H, 9, D), (3, B, H, 9, D), (3, B, H, 9, D)))
    causal = lambda *a: functional.scaled_dot_product_attention(*a, is_causal=True)
    close(torch.vmap(causal)(q, k, v), torch.stack([causal(*a) for a in zip(q, k, v, strict=True)]))
    gradient = torch.func.grad(lambda a: causal(a, k[0], v[0]).square().sum())(q[0])
    leaf = q[0].clone().requires_grad_()
    close(gradient, torch.autograd.grad(causal(leaf, k[0], v[0]).square().sum(), leaf)[0])


@pytest.mark.usefixtures("active")
def test_export() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 7, 16)
    program = torch.export.export(layer, (x,))
    assert any("anyflash" in str(node.target) for node in program.graph.nodes)
    close(program.module()(x), layer(x))


@pytest.mark.slow
@pytest.mark.usefixtures("active")
def test_compiled_varlen() -> None:
    q, k, v = arrays((10, H, D), (10, H, D), (10, H, D), dtype=torch.float32)
    cu = bounds((4, 6))
    call = lambda *a: varlen_attn(*a, cu, cu, 6, 6, window_size=(-1, 0))
    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        out = function(q, k, v)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for own, mine in zip(*results, strict=True):
        close(mine, own)


SLOPES, TABLE = torch.linspace(0.1, 0.7, H, dtype=torch.float64), torch.eye(9, 12, dtype=torch.float64)
DOCUMENT = torch.arange(12) // 4
Mod = Callable[..., Any]
SCORES: dict[str, tuple[Mod, tuple[torch.Tensor, ...]]] = {
    "alibi": (lambda s, b, h, i, j: s - SLOPES[h] * (i - j).abs(), (SLOPES,)),
    "softcap": (lambda s, b, h, i, j: 3 * torch.tanh(s / 3), ()),
    "causal": (lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")), ()),
    "bias": (lambda s, b, h, i, j: s + TABLE[i, j], (TABLE,)),
    "one-element": (lambda s, b, h, i, j: s * SLOPES[2], (SLOPES,)),
    "documents": (lambda s, b, h, i, j: torch.where(DOCUMENT[i] == DOCUMENT[j], s, -1e4), ()),
    "index": (lambda s, b, h, i, j: s * torch.sigmoid(s) + j / 4, ()),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_flex(name: str, masked: bool) -> None:
    """torch's own refuses gradients on a CPU, unless its check is passed over: then it forms every score."""
    score, tables = SCORES[name]
    block = create_block_mask(lambda b, h, i, j: (j <= i) | (j < 2), None, None, 9, 12, device="cpu")
    q, k, v = arrays((B, H, 9, D), (B, 2, 12, D), (B, 2, 12, D))
    for table in tables:
        table.requires_grad_()
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *a: None)
        for function in (torchs_flex, anyflash.torch.flex_attention):
            out, aux = function(
                q, k, v, score, block if masked else None, enable_gqa=True, return_aux=FlexAux(lse=True)
            )
            loss = out.square().sum() + aux.lse.sum()
            found.append([out, aux.lse, *torch.autograd.grad(loss, (q, k, v, *tables))])
    for own, mine in zip(*found, strict=True):
        close(mine, own)


def test_flex_says_what_it_cannot() -> None:
    q, k = arrays((B, H, 9, D), (B, 2, 9, D))
    with pytest.raises(Unsupported, match="erf"):
        anyflash.torch.flex_attention(q, q, q, lambda s, b, h, i, j: torch.erf(s))
    with pytest.raises(InvalidCall, match="enable_gqa"):
        anyflash.torch.flex_attention(q, k, k)
    with pytest.raises(Unsupported, match="greatest"):
        anyflash.torch.flex_attention(q, q, q, return_aux=FlexAux(max_scores=True))
    assert issubclass(NotTraceable, TypeError)
