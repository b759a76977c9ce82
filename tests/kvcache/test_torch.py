"""torch tensors over a cache: what numpy gives, operators that torch's checkers pass, one graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import anyflash as af
from anyflash.contract.run import known
from anyflash.core.errors import Unsupported
from kvcache.cases import CASES, NARROW
from kvcache.laying import FORMS, lay_out

B, T, HQ, HK, D, S = 2, 3, 4, 2, 8, 16
ANGLE = torch.arange(32.0)[:, None] / 10 ** (torch.arange(3) / 3)


def arrays(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    r = torch.Generator().manual_seed(seed)
    make = lambda rows, heads: torch.randn(B, rows, heads, D, generator=r).to(dtype)
    return {
        "q": make(T, HQ),
        "cache_k": make(S, HK),
        "cache_v": make(S, HK),
        "k": make(T, HK),
        "v": make(T, HK),
        "lens": torch.tensor([5, 9]),
        "slopes": torch.rand(HQ, generator=r),
    }


def call(q, cache_k, cache_v, k, v, lens, slopes):
    return af.attention_kvcache(
        q, af.KVCache(cache_k, cache_v, lens), k, v, causal=True, rotary=(ANGLE.cos(), ANGLE.sin()),
        alibi_slopes=slopes, return_lse=True, backend="reference",
    )  # fmt: skip


def read(q, cache_k, cache_v, lens, slopes):
    return af.attention_kvcache(
        q, af.KVCache(cache_k, cache_v, lens), sinks=slopes, return_lse=True, backend="reference"
    )


def as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize(
    "case", [c for c in (*CASES[::3], *NARROW) if not c.terms and not c.rules[1:]], ids=str
)
def test_same_as_numpy(case):
    values, _ = known(case)
    form = FORMS[len(case.id) % len(FORMS)]
    new = tuple(map(min, case.packed.lens_q, case.packed.lens_k))
    pair = [lay_out(case, values, form, new) for _ in range(2)]
    for laid in pair:
        laid.keywords.pop("mask", None)  # it holds numpy arrays
    out, lse = pair[0].run("reference")
    tensor, tensor_lse = pair[1].run("reference", as_tensor)
    assert as_array(tensor.contiguous()).tobytes() == np.ascontiguousarray(out).tobytes()
    assert tensor_lse.numpy().tobytes() == lse.tobytes()
    for name in ("k", "v"):
        assert pair[0].cache[name].tobytes() == pair[1].cache[name].tobytes()


def ops(function, given):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        calls: list[Any] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "anyflash":
                self.calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder() as recorder:
        function(**given)
    return recorder.calls


@pytest.mark.parametrize("function", [call, read])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(function, requires_grad):
    given = arrays()
    if function is read:
        del given["k"], given["v"]
    ((op, args),) = ops(function, given)
    assert op._schema.is_mutable == (function is call)
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    args[0].requires_grad_(requires_grad)
    tests = ["test_schema", "test_faketensor"]
    if not requires_grad:  # there is no backward for the others to call
        tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, tuple(args), test_utils=tests)


@pytest.mark.parametrize("function", [call, read])
def test_compiled_is_eager(function):
    """One graph, the same bits, the cache changed in place; other lengths compile nothing anew."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed, lens in enumerate(([5, 9], [0, 13], [13, 13])):
        one, two = (arrays(seed=seed) | {"lens": torch.tensor(lens)} for _ in range(2))
        if function is read:
            for given in (one, two):
                del given["k"], given["v"]
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            results = zip(function(**one), compiled(**two), strict=True)
        assert all(torch.equal(a, b) for a, b in results)
        assert torch.equal(one["cache_k"], two["cache_k"])
        assert torch.equal(one["cache_v"], two["cache_v"])
    torch._dynamo.reset()


def test_heads_first_memory():
    """With layout "bhsd" the memory of `out` is ordered as "bshd"."""
    given = arrays()
    swapped = {name: given[name].transpose(1, 2) for name in ("q", "cache_k", "cache_v")}
    cache = af.KVCache(swapped["cache_k"], swapped["cache_v"], given["lens"])
    out = af.attention_kvcache(swapped["q"], cache, layout="bhsd", backend="reference")
    plain = af.attention_kvcache(
        given["q"], af.KVCache(given["cache_k"], given["cache_v"], given["lens"]), backend="reference"
    )
    assert torch.equal(out.transpose(1, 2), plain)
    assert out.transpose(1, 2).is_contiguous()


def test_a_gradient_is_refused_when_it_is_asked_for():
    given = arrays()
    given["q"].requires_grad_()
    out, lse = call(**given)
    assert out.requires_grad
    assert lse.requires_grad
    with pytest.raises(Unsupported, match="gradient of attention over a KV cache"):
        (out.sum() + lse.sum()).backward()
    with torch.no_grad():
        assert not call(**given)[0].requires_grad


def test_a_cache_with_a_gradient_is_not_written():
    given = arrays()
    given["cache_k"].requires_grad_()
    before = given["cache_v"].clone()
    with pytest.raises(Unsupported, match="appending to a KV cache that requires a gradient"):
        call(**given)
    assert torch.equal(given["cache_v"], before)


def test_autograd_knows_that_the_cache_changed():
    """A gradient that needs the old values of the cache fails instead of being wrong."""
    given = arrays()
    weight = torch.ones((), requires_grad=True)
    product = (weight * given["cache_k"]).sum()
    call(**given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_autocast():
    given = arrays()
    for name in ("cache_k", "cache_v"):
        given[name] = given[name].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = call(**given)
    assert out.dtype == torch.bfloat16


def test_inference_mode():
    with torch.inference_mode():
        given = arrays()
        out, _ = call(**given)
    assert torch.equal(out, call(**arrays())[0])
