"""Tiny models of diffusers, random weights, with its own attention and with ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers", reason="`make test` installs it where it can")

from diffusers.models import attention_dispatch as theirs  # noqa: E402
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn  # noqa: E402
from torch.nn import functional  # noqa: E402

from anyflash import api  # noqa: E402
from anyflash.adapters import diffusers as adapter  # noqa: E402
from anyflash.adapters import pytorch as for_pytorch  # noqa: E402


@pytest.fixture
def installed() -> Iterator[None]:
    adapter.install()
    yield
    adapter.remove()


@dataclass(frozen=True)
class Model:
    """A model, its inputs, and through which of diffusers' two doors its attention goes."""

    id: str
    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]

    def run(self, model: Any) -> list[torch.Tensor]:
        """Output and gradients in float64."""
        torch.manual_seed(1)
        given = self.inputs()
        given = {
            n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for n, t in given.items()
        }
        model.zero_grad(set_to_none=True)
        out = model(**given, return_dict=False)[0]
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
    )


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )


def qwen() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def kept(present: int, of: int, batch: int) -> torch.Tensor:
    mask = torch.ones(batch, of, dtype=torch.bool)
    mask[0, present:] = False
    return mask


MODELS = [
    Model(
        "unet",
        unet,
        lambda: {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": 3,
            "encoder_hidden_states": torch.randn(2, 5, 12),
            "encoder_attention_mask": kept(3, 5, 2),
        },
    ),
    Model(
        "vae",
        lambda: diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, sample_size=8),
        lambda: {"sample": torch.randn(1, 3, 8, 8)},
    ),
    Model(
        "sd3",
        sd3,
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_projections": torch.randn(2, 64),
            "timestep": torch.tensor([1, 1]),
        },
    ),
    Model(
        "flux",
        flux,
        lambda: {
            "hidden_states": torch.randn(1, 16, 4),
            "encoder_hidden_states": torch.randn(1, 6, 32),
            "pooled_projections": torch.randn(1, 32),
            "timestep": torch.tensor([1.0]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(6, 3),
        },
    ),
    Model(
        "qwen",
        qwen,
        lambda: {
            "hidden_states": torch.randn(2, 16, 16),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "encoder_hidden_states_mask": kept(5, 7, 2).long(),
            "timestep": torch.tensor([1.0, 1.0]),
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
    ),
]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To float32's rounding: parts of the models (time embeddings, rotations) are computed in it whatever the
    model's type is, so equal, but what follows is conditioned by them."""
    scale = max(float(wanted.detach().abs().max()), torch.finfo(torch.float32).tiny)
    assert float((found - wanted).detach().abs().max()) <= 64 * torch.finfo(torch.float32).eps * scale


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("how", ["model", "block"])
@pytest.mark.parametrize("case", MODELS, ids=lambda m: m.id)
def test_model(case: Model, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = case.make().double().train()
    with attention_backend("native"):
        own = case.run(model)
    calls: list[object] = []
    attention = api.attention
    monkeypatch.setattr(api, "attention", lambda *a, **k: (calls.append(1), attention(*a, **k))[1])
    if how == "model":
        model.set_attention_backend("anyflash")
        ours = case.run(model)
    else:
        with attention_backend("anyflash"):
            ours = case.run(model)
    assert calls, "ours was not called"
    assert len(own) == len(ours)
    top = max(float(t.abs().max()) for t in own[1:])
    for mine, theirs_ in zip(ours, own, strict=True):
        # Gradients that vanish by symmetry are rounding themselves.
        if float(theirs_.abs().max()) > 1e-9 * top:
            close(mine, theirs_)


B, S, H, D = 2, 9, 4, 8
MASKS = {
    "keys": lambda: kept(6, S, B),
    "keys-4d": lambda: kept(6, S, B)[:, None, None],
    "additive": lambda: torch.randn(B, 1, S, S, dtype=torch.float64),
    "heads": lambda: torch.randn(B, H, S, S) > -1,
    "square": lambda: torch.ones(S, S, dtype=torch.bool).tril(),
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, S, H, D, dtype=torch.float64) for _ in range(3))
    given = MASKS[mask]()
    results = [dispatch_attention_fn(q, k, v, attn_mask=given, backend=b) for b in ("native", "anyflash")]
    bound = 64 * torch.finfo(torch.float64).eps * float(results[0].abs().max())
    assert float((results[0] - results[1]).abs().max()) <= bound


@pytest.mark.usefixtures("installed")
def test_arguments() -> None:
    q, k = torch.randn(B, S, H, D), torch.randn(B, S + 3, 2, D)
    for arguments in ({"enable_gqa": True}, {"enable_gqa": True, "is_causal": True, "scale": 0.2}):
        own, ours = (dispatch_attention_fn(q, k, k, backend=b, **arguments) for b in ("native", "anyflash"))
        close(ours, own)
    _, lse = dispatch_attention_fn(
        q, k, k, enable_gqa=True, attention_kwargs={"return_lse": True}, backend="anyflash"
    )
    assert lse.shape == (B, S, H)


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("case", [m for m in MODELS if m.id in ("unet", "flux")], ids=lambda m: m.id)
def test_compiled(case: Model) -> None:
    torch.manual_seed(0)
    model = case.make().eval()
    inputs = case.inputs()
    with torch.no_grad(), attention_backend("anyflash"):
        own = model(**inputs, return_dict=False)[0]
        close(torch.compile(model, fullgraph=True)(**inputs, return_dict=False)[0], own)


def state() -> list[Any]:
    registry, backends = theirs._AttentionBackendRegistry, theirs.AttentionBackendName
    modules = {n: vars(m).get("F") for n, m in sys.modules.items() if n.startswith("diffusers.")}
    return [
        dict(registry._backends),
        dict(registry._constraints),
        dict(registry._supported_arg_names),
        registry._active_backend,
        vars(registry)["set_active_backend"],
        dict(backends.__members__),
        list(backends._member_names_),
        dict(backends._value2member_map_),
        modules,
    ]


def test_remove_undoes_install() -> None:
    before = state()
    adapter.install()
    adapter.install()
    theirs._AttentionBackendRegistry.set_active_backend(theirs.AttentionBackendName("anyflash"))
    assert state() != before
    adapter.remove()
    assert state() == before
    adapter.remove()
    assert state() == before


def test_beside_the_pytorch_adapter() -> None:
    before, own = state(), functional.scaled_dot_product_attention
    with for_pytorch.use():
        adapter.install()
        with attention_backend("anyflash"):
            unet()(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 12))
    assert functional.scaled_dot_product_attention is own
    adapter.remove()
    assert state() == before


def test_self_check() -> None:
    before = state()
    assert adapter.self_check() is None
    assert state() == before
