"""Programs that import flash_attn, as they are: their flash option, run on anyflash by `anyflash.compat`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyflash.compat
from anyflash.adapters import transformers as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

if TYPE_CHECKING:
    import torch

_TORCH = Requirement("torch", "pip install torch==2.13.0")
_TRANSFORMERS = Requirement("transformers", adapter.target.how_to_install)
_LABML = Requirement("labml-nn", "pip install --no-deps labml-nn==0.5.1")
_IMPLEMENTATIONS: dict[Role, str] = {"eager": "eager", "best": "sdpa", "ours": "flash_attention_2"}


@contextmanager
def _door(open_: bool) -> Iterator[None]:
    """While it is open, `import flash_attn` finds anyflash."""
    if not open_:
        yield
        return
    anyflash.compat.install()
    try:
        yield
    finally:
        anyflash.compat.remove()


@contextmanager
def _attention(model: Any, role: Role) -> Iterator[None]:
    with _door(role == "ours"):
        model.set_attn_implementation(_IMPLEMENTATIONS[role])
        try:
            yield
        finally:
            model.set_attn_implementation("eager")


def _variants(context: Callable[[Role], Any], best: str) -> tuple[Variant, ...]:
    labels: dict[Role, str] = {"eager": "eager", "best": best, "ours": "anyflash as flash_attn"}
    return tuple(Variant(role, label, partial(context, role)) for role, label in labels.items())


def _in_float64(model: Any) -> Any:
    """A copy for the reference. Under SDPA: transformers' eager attention takes its softmax in float32."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("sdpa")
    return exact


def _llama(layers: int, longest: int) -> tuple[Any, str]:
    """A model of Llama's architecture that reads bytes, and what it is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=longest,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    return (
        model,
        f"Llama of {layers} layers, {parameters / 1e6:.0f} M parameters (random), 12:4 heads of 64",
    )


def _bytes(text: str) -> list[int]:
    return list(text.encode("ascii", "replace"))


def _build_generation(quick: bool) -> Workload:
    import torch

    prompt, steps, layers = (512, 8, 2) if quick else (2048, 32, 3)
    tokens = torch.tensor(_bytes(corpus.text(prompt + steps)))[None]
    model, what = _llama(layers, prompt + steps)
    model.eval()

    def decode(network: Any) -> Result:
        # Each step is fed the text's next byte: what is generated freely parts at the first near tie.
        with torch.inference_mode():
            out = network(tokens[:, :prompt], use_cache=True, logits_to_keep=1)
            found = [out.logits[0, -1]]
            for at in range(prompt, prompt + steps):
                out = network(tokens[:, at : at + 1], past_key_values=out.past_key_values)
                found.append(out.logits[0, -1])
        return Result({"logits": torch.stack(found).numpy()}, {})

    return Workload(
        f"{what}: reads {prompt} bytes of text, then {steps} more one by one with its KV cache",
        "float32",
        lambda role: decode(model),
        lambda: decode(_in_float64(model)),
        _variants(partial(_attention, model), "sdpa"),
    )


def _build_packed(quick: bool) -> Workload:
    import torch

    count, longest, layers = (4, 40, 1) if quick else (6, 120, 2)
    texts = [torch.tensor(_bytes(passage)) for passage in corpus.passages(count, 12, longest)]
    lengths = [len(text) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    present = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    packed = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model, what = _llama(layers, max(lengths))
    model.train()

    def train(network: Any, role: Role) -> Result:
        network.zero_grad(set_to_none=True)
        if role == "ours":
            logits = network(packed, position_ids=positions, use_cache=False).logits[0]
        else:
            logits = network(padded, attention_mask=present, use_cache=False).logits[present.bool()]
        _loss(logits, texts).backward()
        return Result(
            {"logits": logits.detach().numpy()},
            {name: p.grad.numpy() for name, p in network.named_parameters()},
        )

    total = sum(lengths)
    return Workload(
        f"{what}: {count} passages of {min(lengths)} to {max(lengths)} bytes, forward, loss and backward; "
        f"ours packed in one row of {total}, its own padded to {padded.numel()}",
        "float32",
        lambda role: train(model, role),
        lambda: train(_in_float64(model), "best"),
        _variants(partial(_attention, model), "sdpa"),
    )


def _loss(logits: torch.Tensor, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over every byte but the first of each text. `logits` (bytes of all texts, 256)."""
    import torch

    predicted = torch.cat([part[:-1] for part in logits.split([len(text) for text in texts])])
    return torch.nn.functional.cross_entropy(predicted, torch.cat([text[1:] for text in texts]))


def _build_diffusion(quick: bool) -> Workload:
    import torch
    from labml_nn.diffusion.stable_diffusion.model.unet_attention import CrossAttention, SpatialTransformer

    side = 24 if quick else 64
    torch.manual_seed(0)
    # The layer looks for flash_attn when it is made.
    with _door(True):
        block = SpatialTransformer(channels=320, n_heads=8, n_layers=1, d_cond=768).eval()
    # Sampling begins with noise; 77 tokens are a prompt's.
    latent, prompt = torch.randn(1, 320, side, side), torch.randn(1, 77, 768)

    @contextmanager
    def attention(role: Role) -> Iterator[None]:
        with _door(role == "ours"):
            CrossAttention.use_flash_attention = role == "ours"
            try:
                yield
            finally:
                CrossAttention.use_flash_attention = False

    def denoise(network: Any, x: torch.Tensor, condition: torch.Tensor) -> Result:
        with torch.inference_mode():
            return Result({"features": network(x, condition).numpy()}, {})

    return Workload(
        f"the transformer block of Stable Diffusion's U-Net: {side} x {side} places, 320 channels, 8 heads "
        f"of 40 (which it pads to 64 for flash_attn), 77 prompt tokens; forward",
        "float32",
        lambda role: denoise(block, latent, prompt),
        lambda: denoise(copy.deepcopy(block).double(), latent.double(), prompt.double()),
        _variants(attention, "eager, it has no other"),
    )


_SYSTEM = "Hugging Face transformers, flash_attention_2"
_REQUIRES = (_TORCH, _TRANSFORMERS)
ROWS = [
    Row("flash-attn-llama-generation", _SYSTEM, "reading and decoding text", _REQUIRES, _build_generation),
    Row("flash-attn-llama-packed", _SYSTEM, "training step without padding", _REQUIRES, _build_packed),
    Row(
        "flash-attn-labml-diffusion",
        "labml-nn",
        "diffusion attention, flash option",
        (_TORCH, _LABML),
        _build_diffusion,
    ),
]
