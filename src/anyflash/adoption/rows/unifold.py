"""Uni-Fold: triangle attention, and a whole iteration of its Evoformer, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyflash.adapters import unifold as adapter
from anyflash.adoption import checkouts
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload
from anyflash.adoption.rows._triangle import DIM, HEADS, WIDTH, spread, workload

# The sizes of its model_1; the heads are of 32 columns.
_ALIGNMENT, _PAIR, _DIM, _HEADS, _PAIR_HEADS, _MASKED = 256, 128, 32, 8, 4, 3e4


@contextmanager
def _attention(role: Role) -> Iterator[None]:
    if role == "ours":
        adapter.install()
    try:
        yield
    finally:
        adapter.remove()


@contextmanager
def _or_by_torch(role: Role) -> Iterator[None]:
    """The best there is without us by a forward that calls torch's attention on the sum of mask and bias."""
    from unifold.modules.attentions import Attention

    own = Attention.forward
    if role == "best":
        Attention.forward = _by_torch
    try:
        with _attention(role):
            yield
    finally:
        Attention.forward = own


def _by_torch(self: Any, q: Any, k: Any, v: Any, mask: Any = None, bias: Any = None) -> Any:
    import torch

    gate = torch.sigmoid(self.linear_g(q))
    q, k, v = (
        projection(t).unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
        for projection, t in ((self.linear_q, q), (self.linear_k, k), (self.linear_v, v))
    )
    whole = mask if bias is None else mask + bias
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=whole, scale=self.norm)
    return torch.nn.functional.linear(gate * out.transpose(-2, -3).flatten(-2), self.linear_o.weight)


def _build(quick: bool) -> Workload:
    import torch

    checkouts.keep(adapter.importable())
    from unifold.modules import attentions
    from unifold.modules.evoformer import EvoformerIteration

    rows, length = (16, 64) if quick else (32, 160)
    torch.manual_seed(0)
    # No dropout, so that the three attentions compute the same. Training, as it adds in place otherwise.
    block = EvoformerIteration(
        _ALIGNMENT, _PAIR, _DIM, _DIM, _PAIR, _DIM, _HEADS, _PAIR_HEADS, 4, 0.0, 0.0, False, _MASKED, 1e-5
    ).train()
    for parameter in block.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    m, z = torch.randn(1, rows, length, _ALIGNMENT), torch.randn(1, length, length, _PAIR)
    kept = length - length // 8
    present = (torch.arange(length) < kept).float()
    of_rows, of_pairs = present.expand(1, rows, length).contiguous(), torch.outer(present, present)[None]

    def train(network: Any, dtype: Any = torch.float32) -> Result:
        network.zero_grad(set_to_none=True)
        leaves = [t.to(dtype).requires_grad_() for t in (m.detach(), z.detach())]
        rows_present, pairs_present = of_rows.to(dtype), of_pairs.to(dtype)
        masks = (
            *attentions.gen_msa_attn_mask(rows_present, _MASKED),
            *attentions.gen_tri_attn_mask(pairs_present, _MASKED),
        )
        outs = network(*leaves, rows_present, pairs_present, *masks)
        # Of padding, which is masked by a finite number, only rounding would be compared.
        (outs[0][..., :kept, :].square().mean() + outs[1][..., :kept, :kept, :].square().mean()).backward()
        gradients = {n: p.grad.numpy() for n, p in network.named_parameters()}
        for name, leaf in zip(("alignment", "pair"), leaves, strict=True):
            assert leaf.grad is not None
            gradients[name] = leaf.grad.numpy()
        shown = {"alignment": outs[0][..., :kept, :], "pair": outs[1][..., :kept, :kept, :]}
        return Result({n: o.detach().numpy() for n, o in shown.items()}, gradients)

    def reference() -> Result:
        # In place: a copy of its layer norms keeps the weights of the original. float32 comes back as it was.
        try:
            return train(block.double(), torch.float64)
        finally:
            block.float()

    labels: dict[Role, str] = {"eager": "Uni-Fold", "best": "torch's SDPA put there", "ours": "anyflash"}
    parameters = sum(p.numel() for p in block.parameters())
    return Workload(
        f"EvoformerIteration, {parameters / 1e6:.1f} M parameters (random), {rows} rows of {length} "
        f"residues, {_HEADS} and {_PAIR_HEADS} heads of {_DIM}, masks and pair biases: forward and backward; "
        "its fused softmax is for CUDA, so torch's attention on the sum of mask and bias stands for the best",
        "float32",
        lambda role: train(block),
        reference,
        tuple(Variant(role, label, partial(_or_by_torch, role)) for role, label in labels.items()),
    )


def _build_triangle(quick: bool) -> Workload:
    import torch

    checkouts.keep(adapter.importable())
    from unifold.modules.attentions import TriangleAttentionStarting, gen_tri_attn_mask

    torch.manual_seed(0)
    layer = spread(TriangleAttentionStarting(WIDTH, DIM, HEADS).eval())

    def call(x: Any, mask: Any, chunk: int | None) -> Any:
        starting, _ = gen_tri_attn_mask(mask, _MASKED)
        return layer(x, attn_mask=starting, chunk_size=chunk)

    return workload("Uni-Fold", layer, call, _attention, quick)


_REQUIRES = (Requirement("torch", "pip install torch==2.13.0"), adapter.source, adapter.core)
ROWS = [
    Row(
        "unifold-triangle",
        "Uni-Fold",
        "triangle attention, and the longest that fits",
        _REQUIRES,
        _build_triangle,
    ),
    Row(
        "unifold-evoformer",
        "Uni-Fold",
        "an Evoformer iteration, forward and backward",
        _REQUIRES,
        _build,
    ),
]
