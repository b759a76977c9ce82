"""The operators under torch's own checkers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from anyflash.frontends import torch_autograd, torch_op
from frontend_torch.cases import CASES, Case, each_backend, each_case


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every operator of anyflash that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "anyflash":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def _calls(case: Case, backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The forward and backward operator calls that the case makes."""
    with _Recorder() as recorder:
        out, lse = case.run(case.tensors(torch.float32), backend)
        (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert [func._opname.endswith("_backward") for func, _ in recorder.calls] == [False, True]
    return iter(recorder.calls)


def _fresh(args: tuple[Any, ...], requires_grad: bool) -> tuple[Any, ...]:
    def copy(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [copy(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())

    return tuple(copy(arg) for arg in args)


@each_backend
@each_case
def test_opcheck(case, backend):
    forward, backward = _calls(case, backend)
    torch.library.opcheck(forward[0], _fresh(forward[1], requires_grad=True))
    torch.library.opcheck(forward[0], _fresh(forward[1], requires_grad=False))
    # The backward has no derivative of its own (test_autograd.py), so it is checked without gradients.
    torch.library.opcheck(backward[0], _fresh(backward[1], requires_grad=False))


@each_backend
def test_ordinary_call_skips_the_dispatcher(backend, monkeypatch):
    """Below autograd an ordinary call goes straight to the kernel; one that a mode looks at does not."""
    called = []

    def kernel(*args):
        called.append(args)
        return torch_op.forward_kernel(*args)

    monkeypatch.setattr(torch_autograd, "forward_kernel", kernel)
    case = CASES[0]
    with torch.no_grad():
        case.run(case.tensors(), backend)
    case.run(case.tensors(), backend)
    assert len(called) == 2
    with _Recorder():
        case.run(case.tensors(), backend)
    with FakeTensorMode() as fake:
        case.run({name: fake.from_tensor(t.detach()) for name, t in case.tensors().items()}, backend)
    assert len(called) == 2


@each_backend
@each_case
def test_gradcheck(case, backend):
    tensors = case.tensors()

    def finite(*inputs):
        out, lse = case.function(backend)(*inputs)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    # Every entry of the Jacobian for real kernels, a random projection of it for the definition: it is slow.
    fast = backend == "reference"
    assert torch.autograd.gradcheck(finite, tuple(tensors.values()), eps=1e-6, atol=1e-7, fast_mode=fast)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@each_case
def test_fake_matches(case, dtype, backend):
    """dtypes, shapes and strides of every result are those that the shapes alone predict."""
    real = case.run(case.tensors(dtype), backend)
    meta = {name: t.detach().to("meta") for name, t in case.tensors(dtype).items()}
    for found, predicted in zip(real, case.run(meta, backend), strict=True):
        assert predicted.is_meta
        assert (found.dtype, found.shape, found.stride()) == (
            predicted.dtype,
            predicted.shape,
            predicted.stride(),
        )
