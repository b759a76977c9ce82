"""The portable kernels under Triton's interpreter: cases of the contract, on the CPU.

Kernels are interpreted if TRITON_INTERPRET=1 is set before they are imported, and then cannot be compiled
in the same process: `make test` runs this file in a process of its own.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import numpy as np
import torch
import triton
import triton.language as tl

import anyflash as af
from anyflash.contract import direct, run, table
from anyflash.contract.cases import Case
from anyflash.core.device import CPU
from anyflash.core.errors import Unsupported
from anyflash.dispatch.choose import choose
from anyflash.kernels.triton.interpreter import mend, narrowed, widened
from anyflash.semantics.operands import Gradients, Saved

# One in so many of the contract's table: each takes seconds here. The older Triton gets fewer.
EVERY = 10 if triton.__version__ >= "3.9" else 48
LONGEST = 300
# Strides that are 0 or negative.
ALWAYS = tuple(f"float32-layout_{name}" for name in ("reverse_all", "expand_all", "expand_1", "mixed"))


def cases() -> list[Case]:
    small = [c for c in table.table() if c.dtype != "float64" and c.differentiable and max(c.lens) <= LONGEST]
    sample = small[::EVERY]
    return sample + [c for c in small if c.id in ALWAYS and c not in sample]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_contract(case: Case) -> None:
    report = run.run(case, "triton")
    assert not report.failures, "\n".join(report.failures)


@pytest.mark.parametrize("length", [129, 512])
def test_longer(length: int) -> None:
    """Several tiles of every class, bfloat16, forward and backward, by torch's door."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, h, 64).to(torch.bfloat16).requires_grad_() for h in (2, 1, 1))
    found, wanted = (
        (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))
        for out in (
            af.attention(q, k, v, causal=True, window=(200, None), backend=name) for name in ("triton", "cpu")
        )
    )
    for mine, other in zip(found, wanted, strict=True):
        top = float(other.detach().float().abs().max())
        assert (
            float((mine.float() - other.float()).detach().abs().max())
            <= 4 * torch.finfo(torch.bfloat16).eps * top
        )


def test_nan_in_what_is_masked() -> None:
    """A key that some rows see and others do not: only the former may learn of its NaN."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 70, 2, 16)).astype(np.float32) for _ in range(4))
    clean = direct.attend("triton", q, k, v, dout=dout, causal=True)
    for array in (k, v):
        array[0, 50] = np.nan
    dirty = direct.attend("triton", q, k, v, dout=dout, causal=True)
    np.testing.assert_array_equal(dirty.out[:, :50], clean.out[:, :50])
    assert np.isnan(dirty.out[:, 50:]).all()
    np.testing.assert_array_equal(dirty.dq[:, :50], clean.dq[:, :50])


def test_backward_from_a_given_lse() -> None:
    """As for attention in parts: only lse is handed on, and one row sees no key."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 40, 2, 16)).astype(np.float32) for _ in range(4))
    problem, operands = direct.prepare(q, k, v, mask=lambda at: (at.k <= at.q) & (at.q != 7), softcap=4.0)
    whole = direct.execute("triton", problem, operands, dout)
    stats = np.full((2, *whole.lse.shape), np.nan, np.float32)
    backend = choose(problem, CPU, "triton")
    backend.restate(problem, None, direct.view_of(whole.lse), direct.view_of(stats, True))
    grads = [np.empty_like(x) for x in (q, k, v)]
    backend.backward(
        problem,
        None,
        operands,
        Saved(direct.view_of(whole.out), direct.view_of(stats), direct.view_of(dout)),
        Gradients(*(direct.view_of(x, True) for x in grads)),
    )
    for name, found in zip(("dq", "dk", "dv"), grads, strict=True):
        wanted = getattr(whole, name)
        assert np.abs(found - wanted).max() <= 16 * np.finfo(np.float32).eps * np.abs(wanted).max()
    assert not grads[0][0, 7].any()


@pytest.mark.parametrize(
    ("why", "call"),
    [
        ("float64", {"dtype": np.float64}),
        ("head dims end at 576", {"dim": 577}),
    ],
)
def test_declines(why: str, call: dict[str, object]) -> None:
    x = np.ones((1, 4, 1, call.get("dim", 16)), call.get("dtype", np.float32))
    with pytest.raises((Unsupported, ValueError), match=why if "dim" not in call else None):
        af.attention(x, x, x, backend="triton")


def test_explained_by_what_is_launched() -> None:
    x = np.ones((1, 40, 2, 96), np.float32)
    said = af.explain(x, x, x, backend="triton")
    assert said.backend == "triton"
    assert "interpreter" in str(said)
    assert "32 x 32, 4 warps, 1 stages" in str(said)


def test_rows_far_apart() -> None:
    far = np.empty((2, 2**22), np.float32)[None, :, None, :16]
    near = np.ones((1, 2, 1, 16), np.float32)
    with pytest.raises(Unsupported, match="Make it contiguous"):
        af.attention(far, near, near, backend="triton")


@triton.jit
def product(a, b, c, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(c.dtype.element_ty))


@triton.jit
def total(a, b):
    tl.store(b, tl.load(a) + tl.load(a))


def test_interpreter_is_right_for_bfloat16() -> None:
    mend()
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16).to(torch.bfloat16) for _ in range(2))
    c = torch.empty(16, 16, dtype=torch.bfloat16)
    product[(1,)](a, b, c, 16)
    torch.testing.assert_close(c, (a.float() @ b.float()).to(torch.bfloat16), rtol=0, atol=0)
    with pytest.raises(Exception, match="cast to float32 first"):
        total[(1,)](a, c)


def test_rounding_of_bfloat16() -> None:
    values = torch.tensor([1.0, 1.00390625, 1.01171875, 3.4e38, float("inf"), float("nan"), -0.0])
    rounded = torch.from_numpy(widened(narrowed(values.numpy())))
    torch.testing.assert_close(rounded, values.to(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


def relative_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The gradient of a bias by distance, which is summed over batch entries, heads, rows and keys."""
    length = q.shape[1]
    bias = torch.zeros(2 * length - 1).requires_grad_()
    table = af.table(bias)
    out = af.attention(
        q, k, v, score=lambda s, at: s + table[at.q - at.k + length - 1], causal=True, backend="triton"
    )
    weights = torch.linspace(-1, 1, out[0].numel()).reshape(out.shape[1:])
    return torch.autograd.grad((out * weights).sum(), bias)[0]


def test_scattered_gradient_does_not_depend_on_the_order() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 70, 2, 16) for _ in range(3))
    found = relative_gradient(q, k, v)
    assert found.abs().max() > 0
    for order in ([2, 0, 1], [1, 2, 0]):
        assert torch.equal(relative_gradient(q[order], k[order], v[order]), found)


def test_scattered_gradient_keeps_nan_where_it_belongs() -> None:
    """Row 60 has NaN, and reads distances up to 60."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 1, 16) for _ in range(3))
    clean = relative_gradient(q, k, v)
    q[0, 60] = torch.nan
    found = relative_gradient(q, k, v)
    zero = 69
    assert torch.isnan(found[zero : zero + 61]).all()
    assert torch.equal(found[zero + 61 :], clean[zero + 61 :])
    assert not found[:zero].any()
