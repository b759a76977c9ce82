"""DeepSpeed's own functions and layers with our attention, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed", reason="`make test` installs it where it can")

import deepspeed.ops.deepspeed4science.evoformer_attn as theirs  # noqa: E402
from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention  # noqa: E402
from deepspeed.ops.transformer.inference.config import DeepSpeedInferenceConfig  # noqa: E402
from deepspeed.ops.transformer.inference.op_binding.base import BaseOp  # noqa: E402
from deepspeed.ops.transformer.inference.op_binding.softmax_context import SoftmaxContextOp  # noqa: E402
from deepspeed.ops.transformer.inference.op_binding.workspace import InferenceContext  # noqa: E402

from anyflash.adapters import deepspeed as adapter  # noqa: E402

DOUBLE = torch.float64
ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed() -> Iterator[None]:
    adapter.install()
    yield
    adapter.remove()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 256 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


def evoformer(q: Any, k: Any, v: Any, biases: list[Any]) -> torch.Tensor:
    """The definition."""
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    for bias in biases:
        scores = scores if bias is None else scores + bias
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("biases", ["none", "mask", "pair", "both"])
@pytest.mark.parametrize(("batch", "length", "dim"), [(1, 19, 8), (2, 7, 32), (2, 33, 96)])
def test_evoformer(biases: str, batch: int, length: int, dim: int) -> None:
    """Lengths of 16 and less, odd ones, and more than 64 columns are refused by DeepSpeed's own kernel."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, 3, length, 4, dim, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    mask = torch.randn(batch, 3, 1, 1, length, dtype=DOUBLE, requires_grad=True)
    pair = torch.randn(batch, 1, 4, length, length, dtype=DOUBLE, requires_grad=True)
    given = [mask if biases in ("mask", "both") else None, pair if biases in ("pair", "both") else None]
    found = DS4Sci_EvoformerAttention(q, k, v, list(given))
    wanted = evoformer(q, k, v, given)
    close(found, wanted)
    inputs = [q, k, v, *(b for b in given if b is not None)]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in (found, wanted)]
    for mine, own in zip(*gradients, strict=True):
        close(mine, own)


@pytest.mark.usefixtures("installed")
def test_mask_without_a_gradient() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 3, 19, 4, 8, requires_grad=True)
    pair = torch.randn(1, 1, 4, 19, 19, requires_grad=True)
    mask = torch.zeros(1, 3, 1, 1, 19)
    out = DS4Sci_EvoformerAttention(q, q, q, [mask, pair])
    out.sum().backward()
    assert mask.grad is None
    assert pair.grad is not None
    assert pair.grad.shape == pair.shape


@pytest.mark.usefixtures("installed")
def test_a_row_that_is_masked_with_a_finite_number() -> None:
    """OpenFold's -1e9 on all keys of a row leaves the scores' differences below lse's rounding in float32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 19, 2, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 2, 1, 1, 19)
    mask[0, 1] = -1e9
    found, wanted = DS4Sci_EvoformerAttention(q, k, v, [mask, None]), evoformer(q, k, v, [mask])
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, wanted)]
    for mine, own in zip((found, *gradients[0]), (wanted, *gradients[1]), strict=True):
        close(mine, own)


def test_stock_has_no_kernel_here() -> None:
    q = torch.randn(1, 3, 19, 4, 8)
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        DS4Sci_EvoformerAttention(q, q, q, [])


HEADS, WIDTH, ROOM = 4, 32, 12


def context(run: Any, steps: list[int], mask: torch.Tensor | None, alibi: torch.Tensor | None) -> list[Any]:
    """A prompt and steps of decoding through one layer's attention; `run` is what computes it."""
    memory = InferenceContext.Instance()
    memory.gen_workspace(1, HEADS, 2, steps[0], WIDTH, 1, False, DOUBLE, 0, ROOM, 1)
    config = DeepSpeedInferenceConfig(
        hidden_size=WIDTH, heads=HEADS, dtype=torch.float32, triangular_masking=True
    )
    op = SoftmaxContextOp(config)
    results, seen = [], 0
    generator = torch.Generator().manual_seed(0)
    for rows in steps:
        qkv = torch.randn(2, rows, 3 * WIDTH, dtype=DOUBLE, generator=generator)
        seen += rows
        part = torch.empty(1) if mask is None else mask[:, :seen].clone()
        bias = torch.empty(1) if alibi is None else alibi
        arguments = (HEADS, -1, 0.6, True, False, 1, mask is None, 0, 1, bias, 10000.0, rows > 1, None, None)
        out, *_ = run(op)(qkv, part, 0, False, False, *arguments)
        results.append(out.clone())
    memory.release_workspace()
    return results


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("masked", [False, True])
def test_inference_context(masked: bool) -> None:
    """Prompt and decoding, beside DeepSpeed's own functions in torch."""
    mask = None
    if masked:
        mask = torch.zeros(2, ROOM, dtype=DOUBLE)
        # Not the usual -10000, beside which DeepSpeed's float32 softmax rounds scores by a thousandth.
        mask[1, :2] = -30.0
    ours = context(lambda op: op.softmax_context_func, [5, 1, 1], mask, None)
    adapter.remove()
    BaseOp.inference_module = type("none", (), {})()
    try:
        own = context(lambda op: op.softmax_context_func, [5, 1, 1], mask, None)
    finally:
        BaseOp.inference_module = None
    for mine, wanted in zip(ours, own, strict=True):
        # DeepSpeed takes the softmax in float32 whatever the type is.
        assert float((mine - wanted).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(
            wanted.abs().max()
        )


@pytest.mark.usefixtures("installed")
def test_inference_layer() -> None:
    """A whole layer with injected kernels, which stock DeepSpeed cannot make here."""
    from deepspeed.model_implementations.transformers.ds_gpt import DeepSpeedGPTInference

    config = DeepSpeedInferenceConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        heads=HEADS,
        num_hidden_layers=1,
        dtype=torch.float32,
        triangular_masking=True,
        return_single_tuple=True,
        max_out_tokens=64,
    )
    torch.manual_seed(0)
    layer = DeepSpeedGPTInference(config).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 6, WIDTH)
    with torch.no_grad():
        whole = layer(x)[0]
        first = layer(x[:, :4])[0]
    # Causal: what comes later changes nothing.
    assert float((whole[:, :4] - first).abs().max()) <= 256 * torch.finfo(torch.float32).eps * float(
        first.abs().max()
    )


@pytest.mark.slow
def test_ulysses() -> None:
    """Two processes that share each sequence, against each alone: outputs and gradients."""
    pytest.importorskip("transformers")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    script = [sys.executable, str(ROOT / "tests" / "adapters" / "ulysses.py")]
    both = [
        subprocess.Popen(
            script,
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in both:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert "both agree" in said


def state() -> list[Any]:
    return [
        theirs._attention,
        theirs.attention_bwd,
        theirs.kernel_,
        BaseOp.inference_module,
        SoftmaxContextOp.softmax_context_fallback,
    ]


def test_remove_undoes_install() -> None:
    before = state()
    adapter.install()
    adapter.install()
    assert state() != before
    adapter.remove()
    assert state() == before
    adapter.remove()
    assert adapter.self_check() is None
    assert state() == before
