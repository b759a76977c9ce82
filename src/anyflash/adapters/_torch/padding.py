"""Which keys of each batch entry exist, from the (batch, keys) mask that systems keep of their padding."""

from __future__ import annotations

import torch

from anyflash import api
from anyflash.semantics.expr import Expr, var
from anyflash.semantics.mask import Mask


class Padding:
    """A range of keys for each batch entry where they are contiguous, else a table of all.

    valid  (batch, keys) bool, True = the key exists
    """

    def __init__(self, valid: torch.Tensor) -> None:
        self.valid = valid
        count = valid.sum(-1)
        self.length = valid.shape[-1]
        self.starts = valid.to(torch.uint8).argmax(-1)
        last = self.length - valid.flip(-1).to(torch.uint8).argmax(-1)
        self.stops = torch.where(count > 0, last, 0)
        self.ranges = bool(((self.stops - self.starts) == count).all())

    def formula(self) -> Expr:
        """Ranges are kept in tables, not as numbers, so that other lengths reuse the compiled kernel."""
        if not self.ranges:
            return api.table(self.valid.contiguous())[var("batch"), var("k")]
        starts, stops = (api.table(t.to(torch.int32)) for t in (self.starts, self.stops))
        after, before = starts[var("batch")] <= var("k"), var("k") < stops[var("batch")]
        if not bool(self.starts.any()):
            return before
        if bool((self.stops == self.length).all()):
            return after
        return after & before


def key_mask(valid: torch.Tensor) -> Mask | None:
    """The mask that `valid`, (batch, keys) bool, says; None if every key exists."""
    if torch.compiler.is_compiling():
        # While torch traces, values must not decide anything.
        kept = api.table(valid)
        return Mask(lambda at: kept[at.batch, at.k])
    if bool(valid.all()):
        return None
    formula = Padding(valid).formula()
    return Mask(lambda at: formula)
