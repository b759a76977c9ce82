"""Real programs that import flash_attn, unmodified, with the results of their own attention."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import anyflash.compat
from anyflash.compat.version import FLASH_ATTN

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
# What of each model reaches flash_attn, beside causal attention of grouped heads.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Mistral, window": ("MistralConfig", {"sliding_window": 9, "head_dim": 16}),
    "Gemma 2, softcap": (
        "Gemma2Config",
        {
            "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16,
        },
    ),
    "Qwen 2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "Qwen 3": ("Qwen3Config", {"head_dim": 32}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _door() -> Iterator[None]:
    anyflash.compat.install()
    yield
    anyflash.compat.remove()


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reaches flash_attn: (window_size, softcap) of every call."""
    import flash_attn
    from transformers import modeling_flash_attention_utils as utils

    seen: list[tuple[Any, ...]] = []
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        function = getattr(flash_attn, name)

        @functools.wraps(function)  # transformers reads the signature
        def spy(*args: Any, _function: Any = function, **kwargs: Any) -> Any:
            seen.append((kwargs.get("window_size"), kwargs.get("softcap")))
            return _function(*args, **kwargs)

        monkeypatch.setattr(flash_attn, name, spy)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    return seen


def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES, **options, dtype=dtype)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(dtype)
    # Random weights give nearly even probabilities; sharper ones make a wrong mask change the tokens.
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return made


def prompts() -> tuple[Tensor, Tensor]:
    """(tokens (3, 24), mask), two of them padded on the left."""
    torch.manual_seed(1)
    tokens, mask = torch.randint(2, 97, (3, 24)), torch.ones(3, 24, dtype=torch.int64)
    mask[0, :7] = mask[1, :15] = 0
    return tokens * mask, mask


def run(program: str, folder: Path) -> list[str]:
    """The words that a program prints under `anyflash run`."""
    script = folder / "program.py"
    script.write_text(program)
    command = [sys.executable, "-m", "anyflash", "run", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_generates_the_same_tokens(name: str, windows: list[tuple[Any, ...]]) -> None:
    llm = model(name)
    tokens, mask = prompts()
    call = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        wanted, wanted_logits = llm.generate(tokens, **call), llm(tokens, attention_mask=mask).logits
        llm.set_attn_implementation("flash_attention_2")
        found, logits = llm.generate(tokens, **call), llm(tokens, attention_mask=mask).logits
    assert llm.config._attn_implementation == "flash_attention_2"
    assert torch.equal(found, wanted)
    kept = mask.bool()
    torch.testing.assert_close(logits[kept], wanted_logits[kept], rtol=1e-3, atol=1e-4)
    options = MODELS[name][1]
    size = options.get("sliding_window")
    assert windows
    if size is not None:
        assert (size - 1, size - 1) in {window for window, _ in windows}
    assert {softcap for _, softcap in windows} == {options.get("attn_logit_softcapping")}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_packed(name: str, windows: list[tuple[Any, ...]]) -> None:
    """Two texts in one row, told apart by their positions, and the gradients of a training step."""
    llm = model(name)
    tokens = prompts()[0][2:]
    positions = torch.cat((torch.arange(10), torch.arange(14)))[None]
    parts = [llm(part).logits for part in (tokens[:, :10], tokens[:, 10:])]
    wanted = torch.cat(parts, 1)
    weight = llm.model.layers[0].self_attn.q_proj.weight
    (wanted_grad,) = torch.autograd.grad(wanted.square().mean(), weight)
    llm.set_attn_implementation("flash_attention_2")
    logits = llm(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)
    (grad,) = torch.autograd.grad(logits.square().mean(), weight)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-3, atol=1e-4 * float(wanted_grad.abs().max()))
    assert windows


@pytest.mark.parametrize("name", MODELS)
def test_transformers_continuous_batching(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding reads the cache's pages through flash_attn_with_kvcache, as transformers does on GPUs; where a
    model has windows, it gathers them and calls flash_attn_varlen_func."""
    import flash_attn
    from transformers import modeling_flash_attention_utils as utils

    called = set()
    for function in (flash_attn.flash_attn_with_kvcache, flash_attn.flash_attn_varlen_func):

        @functools.wraps(function)
        def spy(*args: Any, _function: Any = function, **kwargs: Any) -> Any:
            called.add((_function.__name__, kwargs.get("block_table") is not None))
            return _function(*args, **kwargs)

        monkeypatch.setattr(flash_attn, function.__name__, spy)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    llm = model(name)
    llm.set_attn_implementation("flash_attention_2")
    torch.manual_seed(1)
    texts = [torch.randint(2, 97, (length,)).tolist() for length in (5, 17, 40)]
    found = llm.generate_batch(
        inputs=texts,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            page_size=16, num_blocks=40, max_batch_tokens=64
        ),
    )
    assert ("flash_attn_varlen_func", False) in called
    assert ("flash_attn_with_kvcache", True) in called or "sliding_window" in MODELS[name][1]
    llm.set_attn_implementation("eager")
    for text, request in zip(texts, sorted(found), strict=True):
        wanted = llm.generate(torch.tensor([text]), max_new_tokens=8, do_sample=False)
        assert found[request].generated_tokens == wanted[0, len(text) :].tolist()


def test_transformers_imported_behind_the_door(tmp_path: Path) -> None:
    """In a program of its own, started by `anyflash run`, in bfloat16, from the configuration on."""
    program = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, dtype=torch.bfloat16)
torch.manual_seed(0)
llm = AutoModelForCausalLM.from_config(config, attn_implementation="flash_attention_2").to(torch.bfloat16)
tokens = torch.randint(2, 97, (2, 12))
call = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
found = llm.generate(tokens, **call)
import sys; assert "flash_attn" in sys.modules
llm.set_attn_implementation("eager")
print(torch.equal(found, llm.generate(tokens, **call)))
"""
    assert run(program, tmp_path) == ["True"]


def test_transformers_is_left_as_it_was() -> None:
    from transformers import modeling_flash_attention_utils as utils
    from transformers.utils import import_utils

    assert import_utils.is_flash_attn_2_available()
    anyflash.compat.remove()
    assert not import_utils.is_flash_attn_2_available()
    assert not transformers.utils.is_flash_attn_2_available()
    row = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    assert "cpu" not in {name for _, name in row["supported_devices"]}
    llm = model("Llama")
    with pytest.raises((ImportError, ValueError)):
        llm.set_attn_implementation("flash_attention_2")


def absent(module: str) -> Any:
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"{module} cannot be installed on this machine"
    )


@absent("labml_nn")
def test_labml_diffusion_attention() -> None:
    """The attention block of Stable Diffusion with its flash option, which builds the layer of version 1."""
    from labml_nn.diffusion.stable_diffusion.model.unet_attention import CrossAttention, SpatialTransformer

    CrossAttention.use_flash_attention = True
    torch.manual_seed(0)
    block = SpatialTransformer(channels=96, n_heads=2, n_layers=1, d_cond=32)
    inner = block.transformer_blocks[0].attn1
    assert type(inner.flash).__module__.startswith("anyflash")
    image, text = torch.randn(2, 96, 9, 7), torch.randn(2, 5, 32)
    found = block(image, text)
    (grad,) = torch.autograd.grad(found.square().sum(), inner.to_q.weight)
    CrossAttention.use_flash_attention = False
    wanted = block(image, text)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), inner.to_q.weight)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-3, atol=1e-4 * float(wanted_grad.abs().max()))


@absent("xformers")
def test_xformers_imports(tmp_path: Path) -> None:
    """It reads the extension module's name and the version, and refuses versions it does not know."""
    program = "from xformers.ops.fmha import flash; print(flash.FLASH_VERSION)"
    assert run(program, tmp_path) == [FLASH_ATTN]


@absent("diffusers")
def test_diffusers_flash_backend(tmp_path: Path) -> None:
    program = """
import torch
from diffusers.models import attention_dispatch as dispatch
q, k, v = torch.randn(3, 2, 16, 4, 32)
with dispatch.attention_backend("flash"):
    found = dispatch.dispatch_attention_fn(q, k, v)
wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
torch.testing.assert_close(found, wanted.transpose(1, 2))
print("same")
"""
    assert run(program, tmp_path) == ["same"]
