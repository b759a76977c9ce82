"""The torch frontend where its tensors lie on a GPU: operators, compilation, gradients, streams, devices, and
the report's own check. `make verify` runs it where there is a GPU; Triton's interpreter runs what needs none,
on the CPU, so that no slip of the pen meets a GPU first."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="needs triton, which torch for CUDA brings")

import torch

import anyflash as af

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LENGTH, DIM = (24, 16) if INTERPRETED else (300, 64)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: make verify on a machine with one"
)
on_gpu = [pytest.mark.gpu, needs_gpu]
pytestmark = [] if INTERPRETED else on_gpu
alone_on_gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter has none")]


def marked(test: Callable[..., None]) -> Callable[..., None]:
    for mark in alone_on_gpu:
        test = mark(test)
    return test


def tensors(dtype: Any = torch.bfloat16, device: str = DEVICE, seed: int = 0) -> list[Any]:
    made = torch.Generator().manual_seed(seed)
    shapes = [(2, LENGTH, heads, DIM) for heads in (4, 2, 2)]
    return [torch.randn(*shape, generator=made).to(dtype).to(device).requires_grad_() for shape in shapes]


def close(found: Any, wanted: Any) -> None:
    """As two orders of the same sums may differ: results of 16 bits by their own rounding, of 32 by that of
    all sums before them."""
    eps = torch.finfo(found.dtype).eps * (4 if found.dtype is torch.float32 else 1)
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    assert (found - wanted).abs().max() <= 4 * eps * wanted.abs().max()


def call(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
    return af.attention(q, k, v, causal=True, window=(100, None), backend="triton", **keywords)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_the_cpus(dtype: Any) -> None:
    results = []
    for device, backend in ((DEVICE, "triton"), ("cpu", "cpu")):
        inputs = tensors(dtype, device)
        bias = torch.linspace(-1, 1, 4 * LENGTH, device=device).view(1, 4, 1, LENGTH).requires_grad_()
        out, lse = af.attention(*inputs, causal=True, bias=bias, return_lse=True, backend=backend)
        grads = torch.autograd.grad(out.float().square().sum() + lse.sum(), [*inputs, bias])
        results.append((out, *grads[:3]))
        assert grads[3].shape == bias.shape
    for mine, other in zip(*results, strict=True):
        close(mine, other)


def test_the_device_chooses() -> None:
    """Without a name, tensors on a GPU are served there."""
    found = af.explain(*[t.detach() for t in tensors()], causal=True)
    assert found.backend in (("cpu",) if INTERPRETED else ("hopper", "triton"))


def test_operator() -> None:
    """torch's own checks of the operators: schema, fakes, autograd, aot."""
    from anyflash.frontends.torch_op import FORWARD

    q, k, v = tensors(torch.float32)
    arguments = (q, k, v, [], None, None, "", _program(q, k, v), "bshd", "triton")
    torch.library.opcheck(FORWARD["attention"], arguments)


def _program(q: Any, k: Any, v: Any) -> str:
    from anyflash.semantics.keywords import describe_program

    made = describe_program(
        tuple(q.shape), tuple(k.shape), lambda _, t: "float32", layout="bshd", sequences=None, causal=True
    )
    return str(made.program)


@marked
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    compiled = torch.compile(lambda *x: call(*x, softcap=20.0) * 2, fullgraph=True, dynamic=dynamic)
    inputs = tensors()
    found = compiled(*inputs)
    wanted = call(*inputs, softcap=20.0) * 2
    close(found, wanted)
    for mine, other in zip(
        *(torch.autograd.grad(x.float().sum(), inputs) for x in (found, wanted)), strict=True
    ):
        close(mine, other)


@marked
def test_streams() -> None:
    """Work on another stream waits for what it needs, and nobody else does."""
    inputs = [t.detach() for t in tensors()]
    wanted = call(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        copies = [t * 1 for t in inputs]
        found = call(*copies)
    assert not stream.query(), "the host waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, wanted)


@marked
def test_graph_with_gradients() -> None:
    inputs = tensors()
    dout = torch.ones_like(inputs[0])

    def step() -> Any:
        out = call(*inputs)
        return out, *torch.autograd.grad(out, inputs, dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for tensor, other in zip(inputs, tensors(seed=5), strict=True):
            tensor.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for mine, other in zip(found, step(), strict=True):
        assert torch.equal(mine, other)


@marked
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices() -> None:
    """A call runs where its tensors are, whichever device is current."""
    wanted = call(*tensors(device="cuda:0"))
    with torch.cuda.device(0):
        found = call(*tensors(device="cuda:1"))
    assert found.device.index == 1
    assert torch.equal(found.cpu(), wanted.cpu())


@marked
@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_report(backend: str) -> None:
    """The report's quick cases: against float64, in memory that holds NaN, repeated for the same bits."""
    from anyflash.backends.registry import entries
    from gpureport import correctness
    from gpureport.place import Place

    if reason := entries()[backend].reason:
        pytest.skip(reason)
    place = Place(dry=False, quick=True)
    for case in correctness.cases(place, backend):
        found = correctness.check(case, place)
        assert found.get("right") or found.get("declined"), (str(case), found)
