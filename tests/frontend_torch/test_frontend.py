"""What torch users rely on around a call: autocast, checkpointing, hooks, views, seeds, dtypes, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import anyflash as af
from anyflash.core import threads
from anyflash.core.errors import InvalidCall
from frontend_torch.cases import BACKENDS, CASES, assert_close, each_backend, each_case, gradients

BACKEND = BACKENDS[0]
TERMS = 64


def tensors(*, dtype=torch.float32, seed=0, heads=2, length=9):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, length, heads, 8)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def contiguous(inputs):
    return [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in inputs]


@each_backend
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch(dtype, causal, backend):
    inputs = tensors(dtype=dtype)
    out = af.attention(*inputs, causal=causal, backend=backend)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*[t.transpose(1, 2) for t in inputs], is_causal=causal)
    assert_close(out, expected.transpose(1, 2), TERMS)
    pairs = zip(gradients((out,), inputs), gradients((expected.transpose(1, 2),), inputs), strict=True)
    for found, wanted in pairs:
        assert_close(found, wanted, TERMS)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, backend):
    """Results and gradients have q's dtype, sums float32 or float64; a table's gradient has the table's."""
    statistic = torch.float64 if dtype is torch.float64 else torch.float32
    q, k, v = tensors(dtype=dtype)
    slopes = torch.rand(2, requires_grad=True)
    bias = torch.rand(9, 9, dtype=dtype).requires_grad_()
    sinks = torch.rand(2, dtype=torch.float64, requires_grad=True)
    out, lse = af.attention(
        q, k, v, alibi_slopes=slopes, bias=bias, sinks=sinks, return_lse=True, backend=backend
    )
    assert out.dtype is dtype
    assert lse.dtype is statistic
    (out.sum() + lse.sum()).backward()
    for leaf in (q, k, v, slopes, bias, sinks):
        assert leaf.grad.dtype is leaf.dtype
        assert leaf.grad.shape == leaf.shape


@each_backend
def test_only_wanted_gradients(backend):
    """A table alone may want a gradient, and integer or boolean tables never do."""
    q, k, v = [t.detach() for t in tensors()]
    slopes = torch.rand(2, requires_grad=True)
    shift, on = torch.tensor([1, 2]), torch.tensor([True, False])

    def score(s, at):
        distance = abs(at.q - at.k) + af.table(shift)[at.head]
        return af.where(af.table(on)[at.head], s - af.table(slopes)[at.head] * distance, s)

    out = af.attention(q, k, v, score=score, backend=backend)
    out.square().sum().backward()
    assert slopes.grad[0] != 0
    assert slopes.grad[1] == 0
    assert not af.attention(q, k, v, backend=backend).requires_grad
    with torch.no_grad():
        assert not af.attention(q, k, v, alibi_slopes=slopes, backend=backend).requires_grad


SCALARS = {
    "right": lambda t: lambda s, at: s * t,
    "left": lambda t: lambda s, at: t * s,
    "table": lambda t: lambda s, at: s * af.table(t)[()],
    "function": lambda t: lambda s, at: af.maximum(s, s * t),
}


@each_backend
@pytest.mark.parametrize("form", SCALARS.values(), ids=SCALARS)
def test_scalar_tensors(form, backend):
    """A tensor without axes in a score function is read at every call and gets its gradient."""
    q, k, v = tensors(dtype=torch.float64)

    def call(t):
        return af.attention(q.detach(), k, v, score=form(t), backend=backend)

    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (temperature,))


@each_backend
def test_lse_alone(backend):
    """Only lse is used, so the gradient of out is absent rather than zero."""
    q, k, v = tensors(dtype=torch.float64)
    _, lse = af.attention(q, k, v, return_lse=True, backend=backend)
    lse.sum().backward()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    expected = torch.autograd.grad(scores.logsumexp(-1).sum(), [q, k])
    assert_close(q.grad, expected[0], TERMS)
    assert_close(k.grad, expected[1], TERMS)
    assert torch.equal(v.grad, torch.zeros_like(v))


STRIDES = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels-last": lambda t: t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "sliced": lambda t: torch.cat([t, t], -1)[..., 8:],
    "every-other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "flipped-storage-offset": lambda t: torch.cat([t, t])[2:],
    "one-batch-stretched": lambda t: t[:1].expand(2, -1, -1, -1),
    "one-head-stretched": lambda t: t[:, :, :1].expand(-1, -1, 2, -1),
    "one-row-stretched": lambda t: t[:, :1].expand(-1, 9, -1, -1),
    "one-number": lambda t: t[:1, :1, :1, :1].expand(2, 9, 2, 8),
}


@each_backend
@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_strides(strides, backend):
    """Any strides give what contiguous copies give, and gradients reach the tensor behind a view."""
    leaves = tensors()
    views = [strides(leaf) for leaf in leaves]
    copies = [view.contiguous() for view in views]
    bias = torch.rand(9, 1, requires_grad=True)
    for given in (views, copies):
        assert all(t.requires_grad for t in given)
    found = af.attention(*views, bias=bias.expand(9, 9), return_lse=True, backend=backend)
    expected = af.attention(*copies, bias=bias.expand(9, 9).contiguous(), return_lse=True, backend=backend)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    pairs = zip(gradients(found, [*leaves, bias]), gradients(expected, [*leaves, bias]), strict=True)
    for a, b in pairs:
        assert_close(a, b, TERMS)


@each_backend
def test_negative_bit(backend):
    """A tensor whose sign torch keeps aside is read with its sign."""
    q, k, v = [t.detach() for t in tensors()]
    negative = torch.view_as_complex(torch.stack([k, -q], -1)).conj().imag
    assert negative.is_neg()
    assert torch.equal(af.attention(negative, k, v, backend=backend), af.attention(q, k, v, backend=backend))


@each_backend
def test_bhsd_memory(backend):
    """What follows an attention layer, transpose and flatten, is free."""
    q, k, v = [t.transpose(1, 2) for t in tensors()]
    out = af.attention(q, k, v, layout="bhsd", backend=backend)
    flat = out.transpose(1, 2).flatten(2)
    assert flat.data_ptr() == out.data_ptr()
    expected = af.attention(*[t.transpose(1, 2) for t in (q, k, v)], backend=backend)
    assert torch.equal(out.transpose(1, 2), expected)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, backend):
    """q, k and v are cast as torch's own attention casts them, whatever their dtypes were; float64 stays."""
    q, k, v = tensors()
    v = v.to(torch.bfloat16)
    bias = torch.rand(9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = af.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
        double = af.attention(*[t.double() for t in (q, k, v)], backend=backend)
    plain = af.attention(*[t.to(dtype) for t in (q, k, v)], bias=bias, backend=backend)
    assert torch.equal(out, plain)
    assert lse.dtype is torch.float32
    assert double.dtype is torch.float64
    out.sum().backward()
    assert q.grad.dtype is torch.float32


@each_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, backend):
    """Recomputing drops the same elements, so gradients are those of a plain call."""

    def layer(q, k, v):
        return af.attention(q, k, v, dropout_p=0.5, causal=True, backend=backend)

    results = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        inputs = tensors()
        out = run(*inputs)
        torch.manual_seed(99)
        out.square().sum().backward()
        results.append([out, *[t.grad for t in inputs]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_backend
def test_seeds(backend):
    """torch.manual_seed repeats dropout, calls in a row differ, and a seed stands alone."""
    q, k, v = tensors()

    def draw(**keywords):
        return af.attention(q, k, v, dropout_p=0.5, backend=backend, **keywords)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(draw(seed=2**63 - 1), draw(seed=2**63 - 1))
    assert not torch.equal(draw(seed=1), draw(seed=1 + 2**32))
    assert torch.equal(torch.get_rng_state(), state)


@each_case
def test_saved_tensor_hooks(case):
    """Everything the backward needs passes through saved-tensor hooks, and nothing else is kept."""
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().clone()

    inputs = list(case.tensors().values())
    function = case.function(BACKEND)
    expected = gradients(function(*inputs), inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = function(*inputs)
    assert len(packed) > len(inputs)
    for a, b in zip(gradients(results, inputs), expected, strict=True):
        assert torch.equal(a, b)
    with torch.autograd.graph.save_on_cpu():
        results = function(*inputs)
    for a, b in zip(gradients(results, inputs), expected, strict=True):
        assert torch.equal(a, b)


@each_backend
def test_changed_in_place(backend):
    """A saved tensor that was changed before the backward is an error, not a wrong gradient."""
    q, k, v = tensors()
    shifted = v * 1.0
    out = af.attention(q, k, shifted, backend=backend)
    shifted += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_backend
def test_retain_graph(backend):
    q, k, v = tensors()
    out = af.attention(q, k, v, causal=True, backend=backend).sum()
    first = torch.autograd.grad(out, [q, k, v], retain_graph=True)
    second = torch.autograd.grad(out, [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_backend
@each_case
def test_inference_mode(case, backend):
    expected = case.run(case.tensors(), backend)
    with torch.inference_mode():
        found = case.run(case.tensors(), backend)
    for a, b in zip(found, expected, strict=True):
        assert a.is_inference()
        assert torch.equal(a, b)


@each_backend
def test_subclass(backend):
    """A subclass of Tensor, nn.Parameter among them, is a tensor."""

    class Named(torch.Tensor):
        pass

    q, k, v = [t.detach() for t in tensors()]
    out = af.attention(q.as_subclass(Named), torch.nn.Parameter(k), v, backend=backend)
    assert torch.equal(out.as_subclass(torch.Tensor), af.attention(q, k, v, backend=backend))


@each_backend
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_merge(layout, backend):
    """Attention over two halves of the keys combines to attention over all, gradients included."""
    inputs = tensors(dtype=torch.float64)

    def attend(k, v, **keywords):
        q, k, v = (t if layout == "bshd" else t.transpose(1, 2) for t in (inputs[0], k, v))
        return af.attention(q, k, v, layout=layout, return_lse=True, backend=backend, **keywords)

    _, k, v = inputs
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[3] = False
    mask[4, :5] = False
    mask[5, 5:] = False
    whole = attend(k, v, mask=mask)
    halves = attend(k[:, :5], v[:, :5], mask=mask[:, :5]), attend(k[:, 5:], v[:, 5:], mask=mask[:, 5:])
    merged = af.merge(*halves[0], *halves[1], layout=layout)
    for a, b in zip(merged, whole, strict=True):
        assert_close(a, b, TERMS)
    for a, b in zip(gradients(merged, inputs), gradients(whole, inputs), strict=True):
        assert_close(a, b, TERMS)


def test_threads_follow_torch(monkeypatch):
    monkeypatch.delenv("ANYFLASH_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert threads.num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_public_module():
    assert af.torch.attention is af.attention
    assert af.torch.attention_varlen is af.attention_varlen
    assert torch.ops.anyflash.attention.default is not None


Q, K, V = [t.detach() for t in tensors()]
NESTED = torch.nested.nested_tensor([Q[0], Q[1][:4]], layout=torch.jagged)
REFUSED = {
    "k-of-numpy": ("k: .*numpy.*torch", lambda: af.attention(Q, K.numpy(), V)),
    "bias-of-numpy": (
        "bias: .*numpy.*torch",
        lambda: af.attention(Q, K, V, bias=np.ones((9, 9), np.float32)),
    ),
    "table-of-numpy": (
        "table 0: .*numpy.*torch",
        lambda: af.attention(Q, K, V, score=lambda s, at: s + af.table(np.ones(9))[at.k]),
    ),
    "two-devices": ("k: on device meta", lambda: af.attention(Q, K.to("meta"), V)),
    "two-dtypes": ("v: dtype bfloat16", lambda: af.attention(Q, K, V.bfloat16())),
    "complex": ("q: dtype complex64", lambda: af.attention(Q.to(torch.complex64), K, V)),
    "sparse": ("k: dtype float32 in layout torch.sparse_coo", lambda: af.attention(Q, K.to_sparse(), V)),
    "nested": ("q, k, v: a nested tensor", lambda: af.attention(NESTED, NESTED, NESTED)),
    "rank": ("q: shape", lambda: af.attention(Q[0], K, V)),
    "bias-shape": ("bias: shape", lambda: af.attention(Q, K, V, bias=torch.ones(7, 9))),
    "table-index": (
        "table 0",
        lambda: af.attention(Q, K, V, score=lambda s, at: s + af.table(torch.ones(5))[at.k]),
    ),
    "lengths": (
        "cu_seqlens_q: .*ascending",
        lambda: af.attention_varlen(
            Q[0], K[0], V[0], cu_seqlens_q=torch.tensor([0, 5, 3, 9]), cu_seqlens_k=torch.tensor([0, 3, 5, 9])
        ),
    ),
}


@pytest.mark.parametrize(("message", "call"), REFUSED.values(), ids=REFUSED)
def test_refused(message, call):
    with pytest.raises(InvalidCall, match=message):
        call()


def test_foreign_device():
    """What `explain` says of tensors on a device that no backend runs on."""
    text = str(af.explain(*[t.to("meta") for t in (Q, K, V)]))
    assert "on meta" in text


@each_backend
def test_named_backend(backend):
    """`backend=` reaches the operator."""
    assert CASES[0].run(CASES[0].tensors(), backend)[0].shape == (2, 3, 4, 3)
    with pytest.raises(InvalidCall, match="backend: 'none'"):
        CASES[0].run(CASES[0].tensors(), "none")
