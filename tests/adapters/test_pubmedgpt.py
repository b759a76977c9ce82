"""PubMedGPT's GPT-2 by the adapter for transformers, and its own attention where a checkout is named."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import anyflash.compat  # noqa: E402
from anyflash.adapters import transformers as adapter  # noqa: E402
from anyflash.adapters.checkout import Checkout  # noqa: E402

SOURCE = Checkout(
    package="BioMedLM",
    variable="ANYFLASH_SRC_BIOMEDLM",
    repository="https://github.com/stanford-crfm/BioMedLM",
    revision="9e35fdd",
)


def config(**settings: Any) -> Any:
    """Its heads are of 128; the rest is small."""
    from transformers import GPT2Config

    sizes = {"vocab_size": 64, "n_embd": 256, "n_head": 2, "n_layer": 2, "n_positions": 32}
    pdrop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**sizes | pdrop | settings)


@pytest.mark.parametrize("by_layer", [False, True], ids=["plain", "scaled-by-layer"])
def test_training(by_layer: bool) -> None:
    """Loss and gradients, against transformers' own attention that works in the dtype it is given."""
    from transformers import GPT2LMHeadModel

    if not adapter.target.tested(adapter.target.installed() or ""):
        pytest.skip(f"needs {adapter.target}")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config(scale_attn_by_inverse_layer_idx=by_layer)).double()
    for name, parameter in model.named_parameters():
        if "c_attn.weight" in name:
            parameter.data.mul_(8.0)
    ids = torch.randint(64, (2, 17))
    results = []
    adapter.install()
    try:
        for implementation in ("sdpa", adapter.IMPLEMENTATION):
            model.set_attn_implementation(implementation)
            model.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
    finally:
        adapter.remove()
    top = max(float(t.abs().max()) for t in results[0])
    for own, mine in zip(*results, strict=True):
        assert float((mine - own).abs().max()) <= 1024 * torch.finfo(torch.float64).eps * top


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_its_own_flash_attention(dtype: torch.dtype) -> None:
    """The method of its class, which takes half precision, on the flash_attn that we give it."""
    if SOURCE.folder() is None:
        pytest.skip(f"{SOURCE.variable} names no checkout of BioMedLM")
    pytest.importorskip("einops")
    anyflash.compat.install()
    try:
        with SOURCE.importable(under=str(Path("finetune", "utils"))):
            module = importlib.import_module("hf_flash_gpt_2")
            layer = module.GPT2FlashAttention(config(scale_attn_by_inverse_layer_idx=True), layer_idx=1)
            q, k, v = torch.randn(3, 2, 2, 17, 128).to(dtype).unbind(0)
            out, weights = layer._attn(q, k, v)
    finally:
        anyflash.compat.remove()
    assert weights is None
    scores = (q.double() @ k.double().transpose(-1, -2)) * 128**-0.5 / 2
    scores = scores.masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), float("-inf"))
    wanted = scores.softmax(-1) @ v.double()
    # The result is rounded once to `dtype`, and so may each probability be before the second product.
    bound = 2 * torch.finfo(dtype).eps * float(v.abs().max())
    assert float((out.double() - wanted).abs().max()) <= bound
