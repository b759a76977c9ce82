"""Views with strides of their own were read as if they were contiguous: dout of `sum().backward()`, V seen
through a transpose, q, k and v cut out of one projection, a slice of a cache (flash-attention #355; pytorch
#133671, #163597, #181133; ROCm/pytorch #3230; FlagGems #5235, #5896).
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.poison import numpy_dtype
from contract.calls import BITWISE, assert_same_bits, operands, run

B, N, H, D = 2, 70, 4, 24
each_backend = pytest.mark.parametrize("backend", BITWISE)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])


def copies(arrays):
    return {name: np.ascontiguousarray(a) for name, a in arrays.items()}


def both(backend, arrays, **keywords):
    assert_same_bits(run(backend, copies(arrays), **keywords), run(backend, arrays, **keywords))


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(dtype))


@each_backend
@each_dtype
def test_dout_of_a_sum(backend, dtype):
    arrays = operands(dtype, (B, N), (B, N))
    arrays["dout"] = np.broadcast_to(np.ones((), numpy_dtype(dtype)), arrays["dout"].shape)
    both(backend, arrays, causal=True)


@each_backend
@each_dtype
def test_dout_of_a_mean_over_heads(backend, dtype):
    arrays = operands(dtype, (B, N), (B, N))
    arrays["dout"] = np.broadcast_to(normal((B, N, 1, D), dtype), (B, N, H, D))
    both(backend, arrays)


@each_backend
@each_dtype
def test_one_projection(backend, dtype):
    """q, k and v are columns of one (batch, tokens, (heads + 2 kv heads) * dim) array."""
    fused = normal((B, N, (4 + 2 + 2) * D), dtype).reshape(B, N, 8, D)
    cut = {"q": fused[:, :, :4], "k": fused[:, :, 4:6], "v": fused[:, :, 6:]}
    both(backend, operands(dtype, (B, N), (B, N)) | cut, causal=True)


@each_backend
@each_dtype
def test_heads_interleaved_with_q_k_v(backend, dtype):
    """(tokens, batch, heads, 3, dim), as Megatron keeps it: tokens before batch, q, k and v within a head."""
    mixed = normal((N, B, H, 3, D), dtype).transpose(1, 0, 2, 3, 4)
    arrays = operands(dtype, (B, N), (B, N))
    both(backend, arrays | {"q": mixed[:, :, :, 0], "k": mixed[:, :, :, 1], "v": mixed[:, :, :, 2]})


@each_backend
@each_dtype
def test_values_with_tokens_innermost(backend, dtype):
    arrays = operands(dtype, (B, N), (B, N))
    arrays["v"] = np.ascontiguousarray(arrays["v"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    arrays["dout"] = np.ascontiguousarray(arrays["dout"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    both(backend, arrays)


@each_backend
@each_dtype
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_prefix_of_a_cache(backend, dtype, queries):
    """Keys are the first rows of a longer cache, heads before tokens."""
    cache = normal((2, B, 2, 4 * N, D), dtype)
    k, v = (cache[i][:, :, :N].transpose(0, 2, 1, 3) for i in range(2))
    both(backend, operands(dtype, (B, queries), (B, N)) | {"k": k, "v": v}, causal=True)


@each_backend
@each_dtype
def test_one_key_head_for_all(backend, dtype):
    """Keys expanded over heads and batch with stride 0 are the keys of one head."""
    one = normal((1, N, 1, D), dtype)
    arrays = operands(dtype, (B, N), (B, N))
    wide = np.broadcast_to(one, (B, N, 2, D))
    both(backend, arrays | {"k": wide, "v": wide[..., ::-1]})


@each_backend
@each_dtype
def test_time_reversed(backend, dtype):
    arrays = operands(dtype, (B, N), (B, N))
    both(
        backend,
        {name: a[:, ::-1] if a.ndim == 4 else a[..., ::-1] for name, a in arrays.items()},
        causal=True,
    )


@each_backend
def test_tables(backend):
    """A bias that is transposed, reversed or every second element of something."""
    arrays = operands("float32", (B, N), (B, N))
    square = normal((N, N), "float32")
    wide = normal((H, N, 2 * N), "float32")
    for bias in (square.T[None, None], square[::-1, ::-1][None, None], wide[None, :, :, ::2]):
        same = np.ascontiguousarray(bias)
        assert_same_bits(run(backend, arrays, bias=same), run(backend, arrays, bias=bias))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("reduction", ["sum", "mean_over_heads", "first_half"])
def test_gradients_that_torch_hands_back(layout, reduction):
    """What autograd passes as dout: an expanded scalar, an expanded head, a slice padded with zeros."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import anyflash as af

    shape = (B, N, H, D) if layout == "bshd" else (B, H, N, D)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    reduce = {
        "sum": lambda out: out.sum(),
        "mean_over_heads": lambda out: (out.mean(dim=layout.index("h")) ** 2).sum(),
        "first_half": lambda out: (out[..., : D // 2] ** 2).sum(),
    }[reduction]

    def gradients(attend):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        reduce(attend(*inputs)).backward()
        return [x.grad for x in inputs]

    def math(q, k, v):
        heads_first = [x.transpose(1, 2) if layout == "bshd" else x for x in (q, k, v)]
        scores = heads_first[0] @ heads_first[1].transpose(2, 3) / D**0.5
        out = scores.softmax(dim=-1) @ heads_first[2]
        return out.transpose(1, 2) if layout == "bshd" else out

    for ours, theirs in zip(
        gradients(lambda *x: af.attention(*x, layout=layout)), gradients(math), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
