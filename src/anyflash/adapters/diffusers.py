"""Hugging Face diffusers: the attention backend "anyflash".

    from anyflash.adapters import diffusers as anyflash_for_diffusers

    anyflash_for_diffusers.install()
    model.set_attention_backend("anyflash")             # or, for a block:
    with attention_backend("anyflash"): ...

diffusers has two kinds of attention: models that go through its registry of backends (Flux, Qwen), and
attention processors that call torch's function, for which choosing a backend does nothing and says nothing
(UNets, VAEs, Stable Diffusion 3). `install` registers the backend; while it is the active one, the modules of
the processors see a `torch.nn.functional` whose attention is ours. Nobody else does.

diffusers makes the backend that was chosen for one model the active one of the process, and
`reset_attention_backend` leaves it so; so does this adapter, until another backend is chosen or `remove`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from anyflash.adapters.base import Target, disagreement

name = "diffusers"
target = Target(
    package="diffusers",
    module="diffusers",
    minimum="0.42",
    below="0.43",
    how_to_install="pip install 'diffusers>=0.42,<0.43'",
)
BACKEND = "anyflash"
_MEMBER = "ANYFLASH"

_undo: list[Callable[[], object]] = []


def install() -> None:
    """Make the backend available. Changes no model. Raises ImportError if diffusers or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from diffusers.models import attention_dispatch as theirs

    from anyflash.adapters._diffusers.attention import attention_for_diffusers

    backends, registry = theirs.AttentionBackendName, theirs._AttentionBackendRegistry
    member = str.__new__(backends, BACKEND)
    member._name_, member._value_ = _MEMBER, BACKEND
    backends._member_map_[_MEMBER] = member
    backends._member_names_.append(_MEMBER)
    backends._value2member_map_[BACKEND] = member
    registry.register(member)(attention_for_diffusers)
    own = vars(registry)["set_active_backend"]

    def set_active_backend(cls: Any, backend: Any) -> None:
        own.__func__(cls, backend)
        _processors_use(backend == BACKEND)

    registry.set_active_backend = classmethod(set_active_backend)

    def undo() -> None:
        if registry._active_backend == BACKEND:
            registry.set_active_backend(backends.NATIVE)
        registry.set_active_backend = own
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(member, None)
        del backends._member_map_[_MEMBER], backends._value2member_map_[BACKEND]
        backends._member_names_.remove(_MEMBER)

    _undo.append(undo)


def remove() -> None:
    """Take the backend away; if it is the active one, "native" is from now on. A model that it was chosen for
    must be given another one."""
    while _undo:
        _undo.pop()()


def _processors_use(ours: bool) -> None:
    """Give the modules of diffusers that have been imported our `F`, or torch's back."""
    import torch

    torchs = torch.nn.functional
    for at, module in list(sys.modules.items()):
        found = (
            vars(module).get("F") if at.startswith("diffusers.") and isinstance(module, ModuleType) else None
        )
        if found is torchs if ours else isinstance(found, _Functional):
            module.F = _Functional(torchs) if ours else torchs  # type: ignore[attr-defined]


class _Functional(ModuleType):
    """`torch.nn.functional` with our attention."""

    def __init__(self, torchs: ModuleType) -> None:
        from anyflash.adapters._pytorch.functional import scaled_dot_product_attention

        super().__init__(torchs.__name__)
        self.__dict__.update(vars(torchs), scaled_dot_product_attention=scaled_dot_product_attention)


def self_check() -> str | None:
    """None if a tiny UNet agrees with its own attention; else what is wrong."""
    if (absent := target.absent()) is not None:
        return absent
    was_installed = bool(_undo)
    try:
        import torch
        from diffusers import UNet2DConditionModel
        from diffusers.models.attention_dispatch import attention_backend

        install()
    except ImportError as error:
        return target.unusable(error)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=12,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ).eval()
        image, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
        outputs = []
        for backend in ("native", BACKEND):
            with torch.no_grad(), attention_backend(backend):
                outputs.append(model(image, 3, text).sample)
        return disagreement("a tiny UNet", outputs[1], outputs[0])
    finally:
        torch.set_rng_state(state)
        if not was_installed:
            remove()
