"""torch.func: vmap, grad and their nestings; and what has no derivative says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

import anyflash as af
from anyflash.core.errors import Unsupported
from anyflash.frontends import torch_vmap
from frontend_torch.cases import BACKENDS, CASES, DENSE, assert_close, each_backend, each_case, gradients

BACKEND = BACKENDS[0]
COUNT = 3
TERMS = 64


def stacked(tensors: list[Tensor]) -> tuple[list[Tensor], list[int | None]]:
    """COUNT versions of every other tensor, along one axis or another; the rest is shared."""
    made: list[Tensor] = []
    dims: list[int | None] = []
    for position, tensor in enumerate(tensors):
        dim = None if position % 2 else position % (tensor.ndim + 1)
        versions = [tensor.detach() * (1.0 - 0.2 * i) for i in range(COUNT)]
        made.append((tensor.detach() if dim is None else torch.stack(versions, dim)).requires_grad_())
        dims.append(dim)
    return made, dims


def one_by_one(function, tensors, dims) -> list[Tensor]:
    """What vmap means: the function on each version, stacked."""
    results = [
        function(*[t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)])
        for i in range(COUNT)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def loss_of(function):
    def loss(*tensors):
        out, lse = function(*tensors)
        return (out * out.detach().cos()).sum() + torch.where(lse.isfinite(), lse, 0.0).sin().sum()

    return loss


@each_backend
@each_case
def test_vmap(case, backend):
    function = case.function(backend)
    tensors, dims = stacked(list(case.tensors().values()))
    found = vmap(function, in_dims=tuple(dims))(*tensors)
    expected = one_by_one(function, tensors, dims)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, TERMS)
    pairs = zip(gradients(found, tensors), gradients(tuple(expected), tensors), strict=True)
    for a, b in pairs:
        assert_close(a, b, TERMS * COUNT)


@each_backend
@each_case
def test_vmap_of_grad(case, backend):
    """Per-sample gradients, of shared tensors too."""
    loss = loss_of(case.function(backend))
    tensors, dims = stacked(list(case.tensors().values()))
    each = grad(loss, argnums=tuple(range(len(tensors))))
    plain = [t.detach() for t in tensors]
    for a, b in zip(vmap(each, in_dims=tuple(dims))(*plain), one_by_one(each, plain, dims), strict=True):
        assert_close(a, b, TERMS)


@each_backend
@each_case
def test_grad_of_vmap(case, backend):
    function = case.function(backend)
    tensors, dims = stacked(list(case.tensors().values()))
    positions = tuple(range(len(tensors)))
    mapped = loss_of(vmap(function, in_dims=tuple(dims)))
    found = grad(mapped, argnums=positions)(*[t.detach() for t in tensors])
    total = loss_of(lambda *given: one_by_one(function, given, dims))(*tensors)
    for a, b in zip(found, torch.autograd.grad(total, tensors), strict=True):
        assert_close(a, b, TERMS * COUNT)


def test_nested_vmap():
    case = CASES[0]
    q, k, v = [t.detach() for t in case.tensors().values()]
    function = case.function(BACKEND)
    many = torch.randn(2, COUNT, *q.shape, dtype=torch.float64)
    found, _ = vmap(vmap(function, in_dims=(0, None, None)), in_dims=(0, None, None))(many, k, v)
    for i in range(2):
        for j in range(COUNT):
            assert_close(found[i, j], function(many[i, j], k, v)[0], TERMS)


def test_jacrev():
    case = CASES[0]
    q, k, v = [t.detach() for t in case.tensors().values()]

    def total(q):
        return case.function(BACKEND)(q, k, v)[0].sum((1, 2, 3))

    found = jacrev(total)(q)
    for batch in range(q.shape[0]):
        assert_close(found[batch], grad(lambda q, b=batch: total(q)[b])(q), TERMS)


def test_value_of_inner_grad_is_differentiable():
    """The outer level of two sees the inner forward."""
    case = CASES[0]
    q, k, v = [t.detach() for t in case.tensors().values()]
    loss = loss_of(case.function(BACKEND))
    found = grad(lambda q: torch.func.grad_and_value(lambda q: loss(q, k, v))(q)[1])(q)
    assert_close(found, grad(lambda q: loss(q, k, v))(q), TERMS)


def test_mapped_call_is_one_call(monkeypatch):
    """Without dropout and mapped sinks a mapped dense call is folded into one."""
    monkeypatch.setattr(torch_vmap, "_loop", None)
    tensors, dims = stacked([torch.randn(shape) for shape in DENSE.values()])
    assert vmap(CASES[0].function(BACKEND), in_dims=tuple(dims))(*tensors)[0].shape == (COUNT, 2, 3, 4, 3)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_dropout(randomness):
    """Every mapped call drops as it would alone, from one seed or from one each."""
    q = torch.randn(COUNT, 1, 16, 1, 4)

    def function(q):
        v = torch.ones(1, 16, 1, 4)
        return af.attention(q * 0, v, v, dropout_p=0.5, backend=BACKEND)

    found = vmap(function, randomness=randomness)(q)
    assert (found[0] == found[1]).all() == (randomness == "same")


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("second derivative", lambda f, q: torch.autograd.functional.hessian(lambda q: f(q).sum(), q)),
        ("second derivative", lambda f, q: grad(lambda q: grad(lambda q: f(q).sum())(q).sum())(q)),
        ("forward-mode", lambda f, q: jvp(f, (q,), (q,))),
    ],
    ids=["autograd", "func", "jvp"],
)
def test_no_such_derivative(what, call):
    _, k, v = [t.detach() for t in CASES[0].tensors().values()]
    q = CASES[0].tensors()["q"].detach()
    with pytest.raises(Unsupported, match=what):
        call(lambda q: CASES[0].function(BACKEND)(q, k, v)[0], q)


def test_first_derivative_with_create_graph():
    """Asking for a graph of the gradient is fine as long as nothing is differentiated twice."""
    tensors = list(CASES[0].tensors().values())
    out, _ = CASES[0].function(BACKEND)(*tensors)
    (found,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True, retain_graph=True)
    (expected,) = torch.autograd.grad(out.sum(), tensors[0])
    assert torch.equal(found, expected)
