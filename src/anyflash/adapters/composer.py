"""Composer: an algorithm that swaps the attention of whatever model its Trainer is given.

    from anyflash.adapters import composer as anyflash_for_composer

    trainer = Trainer(model=model, algorithms=[anyflash_for_composer.algorithm()], ...)

`install` adds it to every Trainer that is made afterwards. It reaches transformers models, MPT, MosaicBERT,
BERT under Composer's own `Alibi`, and everything that calls torch's attention.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from anyflash.adapters.base import Target, disagreement

name = "composer"
target = Target(
    package="mosaicml",
    module="composer",
    minimum="0.32",
    below="0.33",
    how_to_install="pip install 'mosaicml>=0.32,<0.33'",
)

_undo: list[Callable[[], object]] = []
_swapped: list[Callable[[], object]] = []


def algorithm() -> Any:
    """The algorithm, a `composer.Algorithm`. Raises ImportError if Composer or torch is absent."""
    from anyflash.adapters._composer.algorithm import AnyflashAttention

    return AnyflashAttention(_swapped)


def install() -> None:
    """Give the algorithm to every Trainer made from here on.

    Raises ImportError if Composer or torch is absent.
    """
    if _undo:
        return
    target.warn_if_untested()
    from composer.trainer import Trainer
    from composer.utils import ensure_tuple

    from anyflash.adapters._composer.algorithm import AnyflashAttention

    own = Trainer.__init__
    signature = inspect.signature(own)

    @functools.wraps(own)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(self, *args, **kwargs)
        algorithms = list(ensure_tuple(given.arguments.get("algorithms")))
        if not any(isinstance(each, AnyflashAttention) for each in algorithms):
            given.arguments["algorithms"] = [*algorithms, algorithm()]
        own(*given.args, **given.kwargs)

    Trainer.__init__ = init
    _undo.append(lambda: setattr(Trainer, "__init__", own))


def remove() -> None:
    """Leave Trainers alone again, and give every model whose attention was swapped its own back."""
    for steps in (_swapped, _undo):
        while steps:
            steps.pop()()


def self_check() -> str | None:
    """None if a tiny encoder agrees with itself before the algorithm; else what is wrong."""
    if absent := target.absent():
        return absent
    try:
        import torch
        from composer.core import Event

        from anyflash.adapters._composer.algorithm import AnyflashAttention
    except ImportError as error:
        return target.unusable(error)
    steps: list[Callable[[], object]] = []
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True).double()
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        own = layer(x)
        AnyflashAttention(steps).apply(Event.INIT, SimpleNamespace(model=layer), None)
        return disagreement("a tiny encoder", layer(x), own)
    finally:
        torch.set_rng_state(state)
        while steps:
            steps.pop()()
