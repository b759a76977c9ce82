"""Stable Diffusion: one denoising step of the UNets of CompVis, of Hazy Research's fork, and of labml.ai."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from anyflash.adapters import hazy_diffusers, labml, stable_diffusion
from anyflash.adapters.base import Adapter
from anyflash.adoption import checkouts
from anyflash.adoption.row import Needed, Requirement, Result, Role, Row, Variant, Workload

# Three of the four levels, with all of the attention: heads of 40, 80 and 160 columns.
_WIDTHS, _HEADS, _TOKENS, _TEXT = (320, 640, 1280), 8, 77, 768
_Call = Callable[[Any, Any, Any], Any]


def _by_torch(q: Any, k: Any, v: Any, heads: int, scale: float) -> Any:
    """torch's attention of projected rows (batch, rows, heads x head_dim)."""
    import torch

    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2)


@contextmanager
def _replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Within, each owner's member of that name is the one given."""
    own = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, other in places:
        setattr(owner, name, other)
    try:
        yield
    finally:
        for (owner, name, _), before in zip(places, own, strict=True):
            setattr(owner, name, before)


@contextmanager
def _attention(adapter: Adapter, best: tuple[Any, str, Any], role: Role) -> Iterator[None]:
    """Ours by the adapter; the best there is without us by what is put in the system's place."""
    if role == "ours":
        adapter.install()
    try:
        with _replaced(best) if role == "best" else nullcontext():
            yield
    finally:
        adapter.remove()


def _in_float64(owner: Any, embedding: str, norm: Any) -> AbstractContextManager[None]:
    """These UNets embed the time and normalise in float32, whatever their own type."""
    import torch

    own = getattr(owner, embedding)
    return _replaced(
        (owner, embedding, lambda *args, **kwargs: own(*args, **kwargs).double()),
        (norm, "forward", torch.nn.GroupNorm.forward),
    )


def _workload(
    whose: str,
    model: Any,
    call: _Call,
    attention: Callable[[Role], AbstractContextManager[None]],
    own: str,
    quick: bool,
    in_float64: Callable[[], AbstractContextManager[None]] = nullcontext,
    widths: Sequence[int] = _WIDTHS,
) -> Workload:
    import torch

    side = 16 if quick else 48
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 4, side, side, generator=generator)
    text = torch.randn(1, _TOKENS, _TEXT, generator=generator)
    # What is zero as made would hide the attention.
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)

    def denoise(network: Any, dtype: Any = torch.float32) -> Result:
        with torch.no_grad():
            return Result({"noise": call(network, image.to(dtype), text.to(dtype)).numpy()}, {})

    def reference() -> Result:
        # In place, as some configurations refuse to be copied; float32 comes back as it was.
        try:
            with in_float64():
                return denoise(model.double(), torch.float64)
        finally:
            model.float()

    labels: dict[Role, str] = {"eager": own, "best": "torch's SDPA put there", "ours": "anyflash"}
    dims = ", ".join(str(width // _HEADS) for width in widths)
    parameters = sum(p.numel() for p in model.parameters())
    return Workload(
        f"{whose} UNet of {len(widths)} levels, {parameters / 1e6:.0f} M parameters (random), {_HEADS} "
        f"heads of {dims}, latent {side} x {side}, {_TOKENS} tokens of text: forward",
        "float32",
        lambda role: denoise(model),
        reference,
        tuple(Variant(role, label, partial(attention, role)) for role, label in labels.items()),
    )


def _build_compvis(quick: bool) -> Workload:
    import torch

    checkouts.keep(stable_diffusion.importable())
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules import openaimodel
    from ldm.modules.diffusionmodules.util import GroupNorm32

    torch.manual_seed(0)
    unet = openaimodel.UNetModel(
        image_size=64,
        in_channels=4,
        model_channels=_WIDTHS[0],
        out_channels=4,
        num_res_blocks=1,
        attention_resolutions=[1, 2, 4],
        channel_mult=[width // _WIDTHS[0] for width in _WIDTHS],
        num_heads=_HEADS,
        use_spatial_transformer=True,
        context_dim=_TEXT,
        use_checkpoint=False,
        legacy=False,
    ).eval()

    def by_torch(self: Any, x: Any, context: Any = None, mask: Any = None) -> Any:
        source = x if context is None else context
        projected = self.to_q(x), self.to_k(source), self.to_v(source)
        return self.to_out(_by_torch(*projected, self.heads, self.scale))

    def call(network: Any, image: Any, text: Any) -> Any:
        # It casts what it is given to the type that it was made in.
        network.dtype = image.dtype
        return network(image, torch.tensor([500]), text)

    return _workload(
        "CompVis'",
        unet,
        call,
        partial(_attention, stable_diffusion, (CrossAttention, "forward", by_torch)),
        "ldm",
        quick,
        partial(_in_float64, openaimodel, "timestep_embedding", GroupNorm32),
    )


def _build_hazy(quick: bool) -> Workload:
    import torch

    checkouts.keep(hazy_diffusers.importable())
    from diffusers.models.attention import CrossAttention
    from diffusers.models.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(0)
    # It wants two layers a level at least; two levels of those are as much work as three of one.
    widths = _WIDTHS[:2]
    unet = UNet2DConditionModel(
        sample_size=64,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        cross_attention_dim=_TEXT,
        attention_head_dim=_HEADS,
    ).eval()

    def by_torch(self: Any, query: Any, key: Any, value: Any) -> Any:
        return _by_torch(query, key, value, self.heads, self.scale)

    return _workload(
        "the fork's",
        unet,
        lambda network, image, text: network(image, 500, text).sample,
        partial(_attention, hazy_diffusers, (CrossAttention, "_attention", by_torch)),
        "the fork",
        quick,
        widths=widths,
    )


def _build_labml(quick: bool) -> Workload:
    import torch
    from labml_nn.diffusion.stable_diffusion.model.unet import GroupNorm32, UNetModel
    from labml_nn.diffusion.stable_diffusion.model.unet_attention import CrossAttention

    torch.manual_seed(0)
    unet = UNetModel(
        in_channels=4,
        out_channels=4,
        channels=_WIDTHS[0],
        n_res_blocks=1,
        attention_levels=list(range(len(_WIDTHS))),
        channel_multipliers=[width // _WIDTHS[0] for width in _WIDTHS],
        n_heads=_HEADS,
        d_cond=_TEXT,
    ).eval()

    def by_torch(self: Any, x: Any, cond: Any = None) -> Any:
        source = x if cond is None else cond
        projected = self.to_q(x), self.to_k(source), self.to_v(source)
        return self.to_out(_by_torch(*projected, self.n_heads, self.scale))

    return _workload(
        "labml.ai's",
        unet,
        lambda network, image, text: network(image, torch.tensor([500]), text),
        partial(_attention, labml, (CrossAttention, "forward", by_torch)),
        "labml_nn",
        quick,
        partial(_in_float64, UNetModel, "time_step_embedding", GroupNorm32),
    )


_STEP = "one denoising step of a UNet"
_TORCH: Needed = Requirement("torch", "pip install torch==2.13.0")
_EINOPS: Needed = Requirement("einops", "pip install einops")
ROWS = [
    Row(
        "stable-diffusion-compvis",
        "Stable Diffusion, CompVis",
        _STEP,
        (_TORCH, _EINOPS, Requirement("pillow", "pip install pillow"), stable_diffusion.source),
        _build_compvis,
    ),
    Row(
        "stable-diffusion-hazy",
        "Stable Diffusion, Hazy Research",
        _STEP,
        (
            _TORCH,
            _EINOPS,
            Requirement("huggingface-hub", "pip install huggingface-hub"),
            hazy_diffusers.source,
        ),
        _build_hazy,
    ),
    Row(
        "stable-diffusion-labml",
        "labml-nn",
        _STEP,
        (_TORCH, Requirement("labml-nn", labml.target.how_to_install)),
        _build_labml,
    ),
]
