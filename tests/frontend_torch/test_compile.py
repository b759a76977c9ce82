"""torch.compile and torch.export: one graph, the same numbers and gradients, no compilation twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import anyflash as af
from frontend_torch.cases import BACKENDS, DOCUMENTS, each_backend, each_case, gradients

BACKEND = BACKENDS[0]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Attention whose score function closes over a parameter, a buffer and a number."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(4, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("documents", torch.tensor([0, 0, 1, 1, 1, 2]))
        self.cap = 30.0
        self.backend = backend

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        documents = af.table(self.documents)
        return af.attention(
            q,
            k,
            v,
            score=self.score,
            mask=lambda at: documents[at.q] >= documents[at.k],
            backend=self.backend,
        )

    def score(self, s, at):
        return self.cap * af.tanh(s / self.cap) - af.table(self.slopes)[at.head] * (at.q - at.k)


def inputs(*, batch: int = 2, queries: int = 3, keys: int = 6, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, 4, 5), (batch, keys, 2, 5), (batch, keys, 2, 3))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _layers(q, k, v):
    heads_first = [t.transpose(1, 2) * 2 for t in (q, k, v)]
    mask = af.masks.causal() | af.masks.prefix(2) | af.masks.documents(DOCUMENTS[:, :3], DOCUMENTS)
    out = af.attention(*heads_first, layout="bhsd", mask=mask, backend=BACKEND)
    return out.transpose(1, 2).flatten(2).relu()


TRANSFORMED = {
    "layers": _layers,
    "vmap": lambda q, k, v: torch.vmap(lambda q: af.attention(q, k, v, backend=BACKEND))(
        torch.stack([q, 2 * q])
    ),
    "grad": lambda q, k, v: torch.func.grad(
        lambda q: af.attention(q, k.detach(), v.detach(), backend=BACKEND).sin().sum()
    )(q.detach()),
    "checkpoint": lambda q, k, v: checkpoint(
        lambda *t: af.attention(*t, dropout_p=0.5, backend=BACKEND), q, k, v, use_reentrant=False
    ),
}


@each_backend
@each_case
def test_same_as_eager(case, backend):
    """Forward and gradients, bit for bit, on first and later calls."""
    function = case.function(backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        tensors = list(case.tensors(torch.float32, seed).values())
        expected, found = function(*tensors), compiled(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        pairs = zip(gradients(found, tensors), gradients(expected, tensors), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed(name, compiler):
    """Other transformations inside a compiled function, and layers around the call."""
    function = TRANSFORMED[name]
    tensors = inputs()
    torch.manual_seed(1)
    expected = function(*tensors)
    torch.manual_seed(1)
    with torch._inductor.config.patch(fallback_random=True):
        found = torch.compile(function, fullgraph=True, backend=compiler)(*tensors)
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        pairs = zip(gradients((found,), tensors), gradients((expected,), tensors), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)


def test_compiled_autograd():
    """A backward that is itself traced and compiled."""
    tensors = inputs()

    def train():
        af.attention(*tensors, causal=True, backend=BACKEND).square().sum().backward()

    train()
    expected = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(train, backend="aot_eager")()
    assert all(torch.equal(t.grad, grad) for t, grad in zip(tensors, expected, strict=True))


def test_jit_trace():
    tensors = [t.detach() for t in inputs()]
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        traced = torch.jit.trace(lambda *t: af.attention(*t, causal=True, backend=BACKEND), tensors)
    other = [t.detach() for t in inputs(seed=7)]
    assert torch.equal(traced(*other), af.attention(*other, causal=True, backend=BACKEND))


@each_backend
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_model(compiler, backend):
    """A module with a score function over a parameter: its gradient comes through the compiled backward."""
    model = Model(backend)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for seed in (0, 1):
        tensors = inputs(seed=seed)
        wanted = [*tensors, model.slopes]
        expected, found = model(*tensors), compiled(*tensors)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        pairs = zip(gradients((found,), wanted), gradients((expected,), wanted), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        with torch.no_grad():
            model.slopes *= 2


def test_other_calls_do_not_recompile():
    """What other calls leave in anyflash's tables is no part of a compiled function's guards."""
    model = Model(BACKEND)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(*inputs())
    for softcap in (3.0, 4.0):
        q, k, v = inputs(seed=3)
        af.attention(q, k, v, causal=True, softcap=softcap, backend=BACKEND)
        af.attention(q.detach().numpy(), k.detach().numpy(), v.detach().numpy(), backend=BACKEND)
    compiled(*inputs(seed=4))


def test_dynamic_shapes():
    """Batch and lengths that were marked dynamic change without a new compilation."""
    model = Model(BACKEND)

    def function(q, k, v):
        return model(q, k, v) + af.attention(q, k, v, causal=True, window=(2, None), backend=BACKEND)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for batch, queries in ((2, 3), (5, 4), (3, 6)):
        q, k, v = inputs(batch=batch, queries=queries)
        for tensor in (q, k, v):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(q, 1)
        found, expected = compiled(q, k, v), function(q, k, v)
        assert torch.equal(found, expected)
        pairs = zip(gradients((found,), [q, k, v]), gradients((expected,), [q, k, v]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_bias_with_dynamic_length():
    def function(q, k, v, bias):
        return af.attention(q, k, v, bias=bias, backend=BACKEND)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for queries in (3, 4, 6):
        tensors = [*inputs(queries=queries), torch.rand(queries, 6).requires_grad_()]
        torch._dynamo.mark_dynamic(tensors[0], 1)
        torch._dynamo.mark_dynamic(tensors[3], 0)
        assert torch.equal(compiled(*tensors), function(*tensors))


def test_dropout_follows_the_generator():
    """A compiled call draws its seed where an eager one does, and another seed compiles nothing."""

    def function(q, k, v):
        return af.attention(q, k, v, dropout_p=0.5, backend=BACKEND)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = inputs()
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        expected = function(*tensors)
        torch.manual_seed(seed)
        drawn.append(compiled(*tensors))
        assert torch.equal(drawn[-1], expected)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_autocast_inside():
    def function(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return af.attention(q, k, v, causal=True, backend=BACKEND)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = inputs()
    found, expected = compiled(*tensors), function(*tensors)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(strict, dynamic):
    model = Model(BACKEND)
    tensors = [t.detach() for t in inputs()]
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in tensors) if dynamic else None
    program = torch.export.export(model, tuple(tensors), dynamic_shapes=shapes, strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.anyflash.attention.default in targets
    other = [t.detach() for t in inputs(batch=5 if dynamic else 2, seed=2)]
    assert torch.equal(program.module()(*other), model(*other))
