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
from anyflash.core.errors import Unsupported  # noqa: E402

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
STEPS = [5, 1, 1]


def rows_of(steps: list[int]) -> list[torch.Tensor]:
    """What the layer projects in each step: query, key and value (2, rows, 3 * WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, rows, 3 * WIDTH, dtype=DOUBLE, generator=generator) for rows in steps]


def context(
    run: Any,
    steps: list[int],
    mask: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    window: int | None = None,
) -> list[Any]:
    """A prompt and steps of decoding through one layer's attention; `run` is what computes it."""
    memory = InferenceContext.Instance()
    memory.gen_workspace(1, HEADS, 2, steps[0], WIDTH, 1, False, DOUBLE, 0, ROOM, 1)
    config = DeepSpeedInferenceConfig(
        hidden_size=WIDTH, heads=HEADS, dtype=torch.float32, triangular_masking=True
    )
    op = SoftmaxContextOp(config)
    results, seen = [], 0
    for qkv, rows in zip(rows_of(steps), steps, strict=True):
        seen += rows
        part = torch.empty(1) if mask is None else mask[:, :seen].clone()
        bias = torch.empty(1) if alibi is None else alibi[..., :seen]
        local = (window is not None, window or 1)
        arguments = (HEADS, -1, 0.6, True, *local, mask is None, 0, 1, bias, 10000.0, rows > 1, None, None)
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
    ours = context(lambda op: op.softmax_context_func, STEPS, mask)
    adapter.remove()
    BaseOp.inference_module = type("none", (), {})()
    try:
        own = context(lambda op: op.softmax_context_func, STEPS, mask)
    finally:
        BaseOp.inference_module = None
    for mine, wanted in zip(ours, own, strict=True):
        # DeepSpeed takes the softmax in float32 whatever the type is.
        assert float((mine - wanted).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(
            wanted.abs().max()
        )


def alibi(entries: int) -> torch.Tensor:
    """(entries * HEADS, 1, ROOM), as BLOOM makes it: the second entry begins with two tokens of padding."""
    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(HEADS)], dtype=DOUBLE)
    positions = torch.stack([(torch.arange(ROOM) - 2 * i).clamp(min=0) for i in range(entries)])
    return (slopes[:, None] * positions[:, None]).flatten(0, 1)[:, None]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("entries", [None, 1, 2])
def test_inference_beside_the_definition(entries: int | None, window: int | None) -> None:
    """ALiBi and local attention, with which DeepSpeed's functions in torch fail: a prompt and decoding give
    the rows of one causal attention over all of it. ALiBi is that of all entries or of each; a window counts
    the query's own key."""
    bias = None if entries is None else alibi(entries)
    found = torch.cat(context(lambda op: op.softmax_context_func, STEPS, None, bias, window), 1)
    length = sum(STEPS)
    qkv = torch.cat(rows_of(STEPS), 1).view(2, length, 3, HEADS, -1)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    scores = q @ k.mT * 0.6**2
    if bias is not None:
        scores = scores + bias[..., :length].view(-1, HEADS, 1, length)
    behind = torch.arange(length)[:, None] - torch.arange(length)
    scores = scores.masked_fill((behind < 0) | (behind >= (window or length)), float("-inf"))
    close(found, (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.usefixtures("installed")
def test_local_attention_in_a_cache_of_fixed_length() -> None:
    """There DeepSpeed does not say how much of the cache is in use."""
    memory = InferenceContext.Instance()
    memory.gen_workspace(1, HEADS, 2, 5, WIDTH, 1, False, DOUBLE, 0, ROOM, 1)
    op = SoftmaxContextOp(
        DeepSpeedInferenceConfig(hidden_size=WIDTH, heads=HEADS, dtype=torch.float32, triangular_masking=True)
    )
    prompt, token = rows_of([5, 1])

    def attend(qkv: torch.Tensor, first: bool, used: int) -> Any:
        arguments = (HEADS, -1, 0.6, True, True, 3, True, 0, 1, torch.empty(1), 10000.0, first)
        return op.softmax_context_func(
            qkv, torch.empty(1), 0, False, False, *arguments, torch.tensor([used]), None
        )

    attend(prompt, True, 5)
    with pytest.raises(Unsupported, match="cache of fixed length"):
        attend(token, False, 6)
    memory.release_workspace()


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
