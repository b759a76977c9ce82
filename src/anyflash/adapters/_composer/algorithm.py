"""The algorithm for Composer's Trainer."""

from __future__ import annotations

from typing import Any

from composer.core import Algorithm, Event

from anyflash.adapters._composer.models import Undo, swap


class AnyflashAttention(Algorithm):
    """Swaps the attention of the Trainer's model as the Trainer is made. In a list of algorithms it belongs
    behind `Alibi`.

    undo  where it leaves what takes that back
    """

    def __init__(self, undo: Undo) -> None:
        self._undo = undo

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def match(self, event: Event, state: Any) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        swap(state.model, self._undo)
