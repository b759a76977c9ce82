"""Interleaved timing: each round runs every variant once, so that a machine's slow minutes hit all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

from anyflash.adoption.row import Role, Variant


def interleaved(
    step: Callable[[Role], object],
    variants: Sequence[Variant],
    rounds: int,
    budget: float,
    done: Callable[[int], None],
) -> dict[Role, list[float]]:
    """Seconds of each step, per variant.

    At most `rounds` rounds; after the fifth, none is begun that would pass `budget` seconds. The order turns
    by one from round to round. `done` is told how many rounds are behind. Every variant must have run once
    before.
    """
    seconds: dict[Role, list[float]] = {v.role: [] for v in variants}
    begin = time.perf_counter()
    for i in range(rounds):
        spent = time.perf_counter() - begin
        if i >= 5 and spent + spent / i > budget:
            break
        for j in range(len(variants)):
            variant = variants[(i + j) % len(variants)]
            gc.collect()
            with variant.context():
                start = time.perf_counter()
                kept = step(variant.role)
                seconds[variant.role].append(time.perf_counter() - start)
            del kept
        done(i + 1)
    return seconds
