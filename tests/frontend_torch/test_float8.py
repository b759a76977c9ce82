"""torch tensors of 8-bit floats: numpy's results, torch's own checkers, no gradient."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import anyflash as af
from anyflash.core.errors import Unsupported
from anyflash.frontends import torch_op
from anyflash.semantics.problem import Program

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FACTORS = torch.tensor([[0.5, 2.0], [1.5, 0.25]])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, n, h, 16, generator=generator).to(dtype) for n, h in ((7, 4), (40, 2), (40, 2))
    )


def call(q: Any, k: Any, v: Any, factors: Any, **keywords: Any) -> Any:
    return af.attention(
        q, k, v, causal=True, descale_q=0.5, descale_k=factors, descale_v=factors, return_lse=True, **keywords
    )


@each_dtype
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_same_as_numpy(dtype: torch.dtype, backend: str) -> None:
    given = tensors(dtype)
    kind = getattr(ml_dtypes, str(dtype).removeprefix("torch."))
    arrays = [x.view(torch.uint8).numpy().view(kind) for x in given]
    out, lse = call(*given, FACTORS, backend=backend)
    wanted, wanted_lse = call(*arrays, FACTORS.numpy(), backend=backend)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, torch.from_numpy(wanted.astype(np.float32)).bfloat16())
    assert torch.equal(lse, torch.from_numpy(wanted_lse))


# test_schema compares inputs before and after by operations that torch lacks for 8-bit floats.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    load = "(load 0:f batch (floordiv head 2))"
    text = str(Program(f"(mul score {load})", factor=load))
    arguments = (*tensors(dtype), [FACTORS], None, None, "descale_k", text, "bshd", None)
    torch.library.opcheck(torch_op.FORWARD["attention"], arguments, test_utils=CHECKS)


@each_dtype
@pytest.mark.parametrize("queries", [torch.bfloat16, None], ids=str)
def test_cache(dtype: torch.dtype, queries: torch.dtype | None) -> None:
    """A cache of 8-bit floats, read and appended to, compiled as one graph."""
    q, k, v = tensors(dtype)
    q = q if queries is None else q.to(queries)
    new = [x[:, :2].clone() for x in (k, v)]

    def step(q: Any, cache_k: Any, cache_v: Any, k: Any, v: Any, factors: Any) -> Any:
        cache = af.KVCache(cache_k, cache_v, torch.tensor([30, 17]))
        return af.attention_kvcache(q, cache, k, v, causal=True, descale_k=factors, descale_v=factors)

    plain, compiled = [x.clone() for x in (k, v)], [x.clone() for x in (k, v)]
    out = step(q, *plain, *new, FACTORS)
    again = torch.compile(step, fullgraph=True, backend="aot_eager")(q, *compiled, *new, FACTORS)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, again)
    for x, y, z, added in zip((k, v), plain, compiled, new, strict=True):
        assert torch.equal(y.view(torch.uint8), z.view(torch.uint8))
        assert torch.equal(y[0, 30:32].view(torch.uint8), added[0].view(torch.uint8))
        assert torch.equal(y[0, :30].view(torch.uint8), x[0, :30].view(torch.uint8))


@each_dtype
def test_compiled_with_other_factors(dtype: torch.dtype) -> None:
    """Factors in a tensor are data: one graph serves all."""
    given = tensors(dtype)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for factors in (FACTORS, 3 * FACTORS):
        for found, wanted in zip(compiled(*given, factors), call(*given, factors), strict=True):
            assert torch.equal(found, wanted)
    assert counter.frame_count == 1


def test_autocast_leaves_them() -> None:
    given = tensors(DTYPES[0])
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = call(*given, FACTORS)
    assert torch.equal(out, call(*given, FACTORS)[0])


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "factor"])
def test_no_gradient(which: int) -> None:
    given = [*tensors(DTYPES[0]), FACTORS.clone()]
    given[which].requires_grad_()
    out, _ = call(*given)
    with pytest.raises(Unsupported, match="8-bit floats have a forward only"):
        out.float().sum().backward()


def test_mapped() -> None:
    """vmap folds its axis into the batch; a factor of each entry goes with it."""
    q, k, v = (torch.stack([x, x.flip(1)]) for x in tensors(DTYPES[0]))
    factors = torch.stack([FACTORS, FACTORS.flip(0)])
    found = torch.func.vmap(lambda *given: call(*given)[0])(q, k, v, factors)
    for i in range(2):
        assert torch.equal(found[i], call(q[i], k[i], v[i], factors[i])[0])
