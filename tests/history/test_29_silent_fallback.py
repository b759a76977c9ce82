"""Another implementation ran than the one asked for, and nothing said so (MLX and PyTorch have switches for
it)."""

from __future__ import annotations

import numpy as np
import pytest

import anyflash as af
from anyflash.backends import registry
from anyflash.contract.backends import present
from anyflash.dispatch import plan

X = np.ones((1, 4, 2, 8), np.float32)


@pytest.fixture(autouse=True)
def fresh_plans():
    plan.forget()
    yield
    plan.forget()


@pytest.fixture
def ran(monkeypatch):
    """Names of the backends whose forward ran, in order."""
    names = []
    for name in present():
        backend = registry.entries()[name].backend
        inner = backend.forward

        def forward(*args, name=name, inner=inner):
            names.append(name)
            inner(*args)

        monkeypatch.setattr(backend, "forward", forward)
    return names


@pytest.mark.parametrize("name", present())
def test_the_named_one_runs(name, ran):
    af.attention(X, X, X, backend=name)
    assert ran == [name]
    assert af.explain(X, X, X, backend=name).backend == name


def test_explain_names_the_one_that_runs(ran):
    said = af.explain(X, X, X).backend
    af.attention(X, X, X)
    assert ran == [said]


@pytest.mark.parametrize("name", present())
def test_named_one_that_declines_raises(name, monkeypatch, ran):
    monkeypatch.setattr(registry.entries()[name].backend, "decline", lambda *_: ["not on a Sunday"])
    with pytest.raises(af.Unsupported, match="not on a Sunday"):
        af.attention(X, X, X, backend=name)
    assert ran == []


def test_quadratic_memory_is_never_chosen(monkeypatch, ran):
    """If everything else declines, the reference does not step in; every reason is told."""
    for name in present():
        if name != "reference":
            monkeypatch.setattr(registry.entries()[name].backend, "decline", lambda *_: ["not on a Sunday"])
    with pytest.raises(af.Unsupported) as error:
        af.attention(X, X, X)
    assert ran == []
    assert set(error.value.reasons) == set(registry.entries())
    assert all(error.value.reasons.values())


def test_unknown_name_raises():
    with pytest.raises(af.InvalidCall, match="abacus"):
        af.attention(X, X, X, backend="abacus")
