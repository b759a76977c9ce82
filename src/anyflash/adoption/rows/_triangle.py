"""Triangle attention of a protein model: whole, by its own chunks and by ours, and the longest that fits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from anyflash.adoption.row import Reach, Result, Role, Variant, Workload

# AlphaFold's pair representation and its heads.
WIDTH, DIM, HEADS = 128, 32, 4
# AlphaFold's chunks are of 4 rows, for the sake of their scores. Ours has none, so they may be larger.
_CHUNKS: dict[Role, int | None] = {"eager": None, "best": 4, "ours": 16}


def kept(length: int) -> int:
    """How many of the residues are no padding."""
    return length - length // 8


def pair(length: int) -> tuple[Any, Any]:
    """A pair representation (1, length, length, WIDTH) and its mask (1, length, length), 1 = present."""
    import torch

    generator = torch.Generator().manual_seed(0)
    present = (torch.arange(length) < kept(length)).float()
    return torch.randn(1, length, length, WIDTH, generator=generator), torch.outer(present, present)[None]


def spread(layer: Any) -> Any:
    """As made, the last layer gives zeros, and so does the gate."""
    import torch

    for parameter in layer.mha.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer


def workload(
    whose: str,
    layer: Any,
    call: Callable[[Any, Any, int | None], Any],
    attention: Callable[[Role], AbstractContextManager[None]],
    quick: bool,
) -> Workload:
    """`call` takes the pair representation, its mask and the rows of a chunk."""
    import torch

    length = 128 if quick else 256
    x, mask = pair(length)

    def update(role: Role, x: Any, present: Any) -> Any:
        with torch.inference_mode():
            out = call(x, present, _CHUNKS[role])
        # Of padding, which is masked by a finite number, only rounding would be compared.
        return out[:, : kept(x.shape[1]), : kept(x.shape[1])]

    def step(role: Role) -> Result:
        return Result({"pair": update(role, x, mask).numpy()}, {})

    def reference() -> Result:
        # In place: a copy of Uni-Core's layer norms keeps the weights of the original.
        layer.double()
        try:
            return Result({"pair": update("eager", x.double(), mask.double()).numpy()}, {})
        finally:
            layer.float()

    reach = Reach(
        "residues",
        (64 if quick else 256) << 20,
        range(64, 1025, 32),
        lambda role, size: partial(update, role, *pair(size)),
    )
    labels: dict[Role, str] = {"eager": whose, "best": "its chunks", "ours": "anyflash, its chunks"}
    return Workload(
        f"starting node, {length} residues, {HEADS} heads of {DIM}, mask and pair bias: forward; whole, by "
        f"its chunks of {_CHUNKS['best']} rows, and ours by chunks of {_CHUNKS['ours']}",
        "float32",
        step,
        reference,
        tuple(Variant(role, label, partial(attention, role)) for role, label in labels.items()),
        reach=reach,
    )
