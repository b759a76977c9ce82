"""PyTorch itself: a training step of `nn.TransformerEncoder` on real text."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from anyflash.adapters import pytorch as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

if TYPE_CHECKING:
    import torch

_WIDTH, _HEADS, _VOCABULARY = 512, 8, 256
_TORCH = Requirement("torch", adapter.target.how_to_install)


def _build(dtype: str, quick: bool) -> Workload:
    import torch
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel

    length, layers = (1024, 2) if quick else (2048, 4)
    text = corpus.text(length + 1).encode("ascii", "replace")
    tokens = torch.tensor(list(text), dtype=torch.long)[None]
    torch.manual_seed(0)
    # Dropout is 0: torch has no fused attention with dropout on a CPU, and random bits could not be compared.
    layer = nn.TransformerEncoderLayer(
        _WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    model = nn.ModuleDict(
        {
            "token": nn.Embedding(_VOCABULARY, _WIDTH),
            "position": nn.Embedding(length, _WIDTH),
            "encoder": nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
            "head": nn.Linear(_WIDTH, _VOCABULARY),
        }
    ).to(getattr(torch, dtype))
    step = partial(_step, model, tokens)

    def reference() -> Result:
        with sdpa_kernel(SDPBackend.MATH):
            return _step(copy.deepcopy(model).double(), tokens, "eager")

    parameters = sum(p.numel() for p in model.parameters())
    return Workload(
        f"byte language model, {layers} layers, {parameters / 1e6:.1f} M parameters, {_HEADS} heads of "
        f"{_WIDTH // _HEADS}, causal, {length} bytes of text: forward, loss and backward in {dtype}",
        dtype,
        step,
        reference,
        (
            Variant("eager", "SDPA math", lambda: sdpa_kernel(SDPBackend.MATH)),
            Variant("best", "SDPA flash", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
            Variant("ours", "anyflash", adapter.use),
        ),
    )


def _step(model: Any, tokens: torch.Tensor, role: Role) -> Result:
    import torch
    from torch.nn import functional

    length = tokens.shape[1] - 1
    model.zero_grad(set_to_none=True)
    x = model["token"](tokens[:, :-1]) + model["position"].weight
    causal = torch.nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
    logits = model["head"](model["encoder"](x, mask=causal, is_causal=True))
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[0, 1:])
    loss.backward()
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return Result(
        {"logits": logits.detach().to(wide).numpy()},
        {name: p.grad.to(wide).numpy() for name, p in model.named_parameters()},
    )


ROWS = [
    Row(
        f"torch-encoder-{dtype}",
        "PyTorch",
        f"nn.TransformerEncoder, training step, {dtype}",
        (_TORCH,),
        partial(_build, dtype),
    )
    for dtype in ("float32", "bfloat16")
]
