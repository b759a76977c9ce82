"""The private names of flash_attn, as other libraries call them; compiling; later generations' backward."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

import anyflash
from anyflash.compat import flash_attn
from anyflash.compat import flash_attn_interface as generation3
from anyflash.compat.errors import Refused
from anyflash.compat.flash_attn import cute, flash_attn_interface
from compat.arrays import arrays, starts


def test_ring_attention() -> None:
    """As context-parallel libraries do it: keys in two parts, each its own forward, merged by lse; then each
    part's backward from the merged out and lse."""
    q, k, v = arrays()
    dout = torch.randn_like(q)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = flash_attn.flash_attn_func(*whole)
    wanted.backward(dout)

    terms = (0.0, 0.25, False, -1, -1, 0.0, None)
    parts = [(k[:, :4], v[:, :4]), (k[:, 4:], v[:, 4:])]
    outs, lses = zip(
        *[flash_attn_interface._flash_attn_forward(q, *kv, *terms, False)[:2] for kv in parts], strict=True
    )
    lse = torch.logaddexp(*lses)
    out = sum(torch.exp(one - lse).transpose(1, 2)[..., None] * o for o, one in zip(outs, lses, strict=True))
    torch.testing.assert_close(out, wanted)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for at, (k_part, v_part) in zip((slice(0, 4), slice(4, None)), parts, strict=True):
        part = torch.full_like(q, torch.nan)
        flash_attn_interface._flash_attn_backward(
            dout, q, k_part, v_part, out, lse, part, dk[:, at], dv[:, at], *terms, False
        )
        dq += part
    for got, leaf in zip((dq, dk, dv), whole, strict=True):
        torch.testing.assert_close(got, leaf.grad)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("varlen", [False, True])
def test_private_backward_is_autograd(varlen: bool, dropout_p: float) -> None:
    """With everything on: causal window, softcap, ALiBi, dropout."""
    q, k, v = arrays(keys=11)
    slopes = torch.rand(2, 4)
    terms = (0.2, True, 4, -1, 3.0, slopes)
    packed = (starts(6, 6), starts(11, 11), 6, 11) if varlen else ()
    if varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    forward = getattr(flash_attn_interface, f"_flash_attn{'_varlen' * varlen}_forward")
    backward = getattr(flash_attn_interface, f"_flash_attn{'_varlen' * varlen}_backward")
    public = flash_attn.flash_attn_varlen_func if varlen else flash_attn.flash_attn_func
    torch.manual_seed(3)
    out, lse, _, state = forward(q, k, v, *packed, dropout_p, *terms, False)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(3)
    same = public(*leaves, *packed, dropout_p, 0.2, True, (4, -1), 3.0, slopes)
    assert torch.equal(out, same)
    dout = torch.randn_like(out)
    grads = [torch.full_like(x, torch.nan) for x in leaves]
    backward(dout, q, k, v, out, lse, *grads, *packed, dropout_p, *terms, False, state)
    for got, want in zip(grads, torch.autograd.grad(same, leaves, dout), strict=True):
        torch.testing.assert_close(got, want)
    if dropout_p:
        with pytest.raises(Refused, match="rng_state"):
            backward(dout, q, k, v, out, lse, *grads, *packed, dropout_p, *terms, False)


def test_operators_of_torch() -> None:
    q, k, v = (x.requires_grad_(False) for x in arrays(dtype=torch.float32))
    terms = (0.0, 0.25, True, -1, -1, 0.0, None)
    names = torch.ops.flash_attn
    check = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(names._flash_attn_forward.default, (q, k, v, *terms, False), **check)
    packed = (starts(6, 6), starts(9, 9), 6, 9)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    torch.library.opcheck(
        names._flash_attn_varlen_forward.default, (*rows, *packed, 0.0, 0.25, True), **check
    )
    out, lse, *_ = flash_attn_interface._wrapped_flash_attn_forward(q, k, v, *terms, False)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    torch.library.opcheck(
        names._flash_attn_backward.default, (out, q, k, v, out, lse, *grads, *terms, False), **check
    )
    out, lse, *_ = flash_attn_interface._wrapped_flash_attn_varlen_forward(*rows, *packed, 0.0, 0.25, True)
    grads = [torch.empty_like(x) for x in rows]
    torch.library.opcheck(
        names._flash_attn_varlen_backward.default,
        (out, *rows, out, lse, *grads, *packed, *terms, False),
        **check,
    )


SLOPES = torch.rand(4)
TERMS = {"causal": True, "window_size": (5, 0), "softcap": 9.0}
PACKED = (starts(6, 6), starts(9, 9), 6, 9)
COMPILED: dict[str, Callable[..., Tensor]] = {
    "dense": lambda q, k, v: flash_attn.flash_attn_func(q, k, v, alibi_slopes=SLOPES, **TERMS),
    "dropout": lambda q, k, v: flash_attn.flash_attn_func(q, k, v, 0.2),
    "lse": lambda q, k, v: flash_attn.flash_attn_func(
        q, k, v, alibi_slopes=SLOPES, causal=True, return_attn_probs=True
    )[1],
    "varlen": lambda q, k, v: flash_attn.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), *PACKED, alibi_slopes=SLOPES, **TERMS
    ),
    "generation 3": lambda q, k, v: generation3.flash_attn_func(q, k, v, attention_chunk=4, **TERMS),
    "generation 4": lambda q, k, v: cute.flash_attn_func(q, k, v, causal=True, window_size=(5, None))[0],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name: str) -> None:
    """fullgraph, forward and backward."""
    function = COMPILED[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in arrays(dtype=torch.float32)]
    found = []
    for call in (function, compiled):
        torch.manual_seed(0)
        out = call(*leaves)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=name == "lse")))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(2, 0, 5), (0, 3, 5), (2, 3, 0)])
def test_nothing_to_do(batch: int, rows: int, keys: int) -> None:
    q = torch.randn(batch, rows, 4, 8, requires_grad=True)
    k = torch.randn(batch, keys, 4, 8, requires_grad=True)
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, k, 0.3, return_attn_probs=True)
    assert (out == 0).all()
    assert (lse == torch.inf).all()
    assert s_dmask.shape == (batch, 4, 128 * bool(rows), 128 * bool(keys))
    for x, grad in zip((q, k), torch.autograd.grad(out.sum(), (q, k)), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_functions_of_autograd_by_position() -> None:
    q, k, v = arrays()
    rest = (0.0, None, True, (-1, -1), 0.0, None, False)
    wanted = flash_attn.flash_attn_func(q, k, v, *rest)
    assert torch.equal(flash_attn_interface.FlashAttnFunc.apply(q, k, v, *rest, False, True), wanted)
    kv = torch.stack((k, v), 2)
    assert torch.equal(flash_attn_interface.FlashAttnKVPackedFunc.apply(q, kv, *rest, False, True), wanted)
    rows, packed = [x.flatten(0, 1) for x in (q, k, v)], (starts(6, 6), starts(9, 9), 6, 9)
    found = flash_attn_interface.FlashAttnVarlenFunc.apply(*rows, *packed, *rest, False, None, True)
    assert torch.equal(found, wanted.flatten(0, 1))
    kv = kv.flatten(0, 1)
    found = flash_attn_interface.FlashAttnVarlenKVPackedFunc.apply(rows[0], kv, *packed, *rest, False, True)
    assert torch.equal(found, wanted.flatten(0, 1))
    qkv = torch.stack((q, q, q), 2)
    wanted = flash_attn.flash_attn_func(q, q, q, *rest)
    assert torch.equal(flash_attn_interface.FlashAttnQKVPackedFunc.apply(qkv, *rest, False, True), wanted)
    packed = (starts(6, 6), 6)
    found = flash_attn_interface.FlashAttnVarlenQKVPackedFunc.apply(
        qkv.flatten(0, 1), *packed, *rest, False, True
    )
    assert torch.equal(found, wanted.flatten(0, 1))


def test_extension_module_by_position() -> None:
    gpu = flash_attn_interface.flash_attn_gpu
    q, k, v = arrays()
    wanted = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    into = torch.full_like(q, torch.nan)
    out, lse, _, state = gpu.fwd(q, k, v, into, None, 0.0, 0.25, True, -1, -1, 0.0, False, None)
    assert out is into
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])
    rest = (None, 0.0, 0.25, True, -1, -1, 0.0, False, None, state)
    dq, dk, dv, _ = gpu.bwd(out, q, k, v, out, lse, None, None, None, *rest)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(flash_attn.flash_attn_func(*leaves, causal=True), leaves, out)
    for got, one in zip((dq, dk, dv), want, strict=True):
        torch.testing.assert_close(got, one)
    rows, packed = [x.flatten(0, 1) for x in (q, k, v)], (starts(6, 6), starts(9, 9))
    flat, lse, *_ = gpu.varlen_fwd(
        *rows, None, *packed, None, None, None, None, 6, 9, 0.0, 0.25, False, True, -1, -1, 0.0, False, None
    )
    assert torch.equal(flat, wanted[0].flatten(0, 1))
    dq, *_ = gpu.varlen_bwd(
        flat, *rows, flat, lse, None, None, None, *packed, None, 6, 9, 0.0, 0.25, False, True, -1, -1, 0.0,
        False, None, state,
    )  # fmt: skip
    torch.testing.assert_close(dq.view_as(q), want[0])


def test_packed_heads_of_generation_3() -> None:
    """qkv of four axes: `num_heads_q` query heads, then those of the keys and of the values."""
    q, k, v = (torch.randn(2, 7, heads, 16) for heads in (6, 2, 2))
    found = generation3.flash_attn_qkvpacked_func(torch.cat((q, k, v), 2), causal=True, num_heads_q=6)
    assert torch.equal(found, generation3.flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize("module", [generation3, cute.interface], ids=["3", "4"])
def test_combine(module: ModuleType) -> None:
    q, k, v = arrays()
    parts = [
        anyflash.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 4), (4, 4), (4, 9))
    ]
    outs = torch.stack([out for out, _ in parts])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    out, lse = module.flash_attn_combine(outs, lses)
    wanted, wanted_lse = anyflash.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse.transpose(1, 2))
    nothing, minus = module.flash_attn_combine(outs[1:2], lses[1:2])
    assert (nothing == 0).all()
    assert (minus == -torch.inf).all()


def test_backward_of_later_generations() -> None:
    q, k, v = arrays()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole = anyflash.attention(*leaves, causal=True, window=(4, None))
    want = torch.autograd.grad(whole, leaves, torch.ones_like(whole))
    out, lse, *_ = generation3._flash_attn_forward(q, k, v, causal=True, window_size_left=4)
    grads = [torch.full_like(x, torch.nan) for x in leaves]
    call = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    one = torch.ones_like(out)
    generation3._flash_attn_backward(one, q, k, v, out, lse, is_causal=True, window_size_left=4, **call)
    found = cute.interface._flash_attn_bwd(q, k, v, out, one, lse, causal=True, window_size_left=4)
    for a, b, c in zip(grads, found, want, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)
