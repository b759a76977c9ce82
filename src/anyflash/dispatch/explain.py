"""What a call would do, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyflash.backends import registry
from anyflash.backends.base import Backend
from anyflash.core.device import Device
from anyflash.core.errors import InvalidCall
from anyflash.dispatch.choose import reasons, summary
from anyflash.dispatch.plan import guard
from anyflash.semantics import text
from anyflash.semantics.addressing import sequence_lengths
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.cost import Cost, cost
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Problem
from anyflash.semantics.tiles import FULL, PARTIAL, Dims, tile_classes

# Sides of a tile where the backend names none.
_BLOCK = 64
# Classes are held for all tiles at once; a finer grid than this says no more to a reader.
_MAX_TILES = 1 << 21


class Tiles(NamedTuple):
    """Tiles of the score matrices of all batch entries and heads, by what the mask leaves of them."""

    block_q: int
    block_k: int
    total: int
    empty: int
    partial: int
    full: int

    def __str__(self) -> str:
        share = f"{100 * self.empty / self.total:.0f}% skipped" if self.total else "none"
        return (
            f"{self.total} of {self.block_q} x {self.block_k}: {self.empty} empty, {self.partial} partial, "
            f"{self.full} full ({share})"
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer of `anyflash.explain`; prints as a report.

    backend     the one that would run, None if none can
    config      its configuration
    tiles       how many tiles the mask empties, None if the host cannot read its tables or the lengths
    cost        operations in tiles that are not skipped, and bytes
    exact       whether lengths were read; those on a device are not, and then `cost` is an upper bound
    facts       what the backend says of itself: instruction set, threads, scratch bytes
    declined    each other backend's reasons
    """

    problem: Problem
    device: Device
    backend: str | None
    config: Any
    tiles: Tiles | None
    cost: Cost
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    declined: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    exact: bool = True

    def __str__(self) -> str:
        program = self.problem.program
        rows: dict[str, Any] = {"backend": self.backend or "none can run this call"}
        if self.config is not None:
            rows["config"] = self.config
        for name, source in (
            ("score", program.score),
            ("mask", program.mask),
            ("factor of out", program.factor),
        ):
            if source is not None:
                rows[name] = text.pretty(text.parse(source))
        if self.problem.tables:
            tables = enumerate(self.problem.tables)
            rows["tables"] = ", ".join(f"table{slot} {spec.dtype} {spec.shape}" for slot, spec in tables)
        rows["tiles"] = self.tiles or f"unknown: {self._unread()} outside host memory"
        cost, at_most = self.cost, "" if self.exact else "at most "
        rows["operations"] = (
            f"{at_most}{_scaled(cost.flops_forward, 'FLOP')} forward, "
            f"{_scaled(cost.flops_backward, 'FLOP')} backward, in tiles that are not skipped"
        )
        rows["bytes"] = (
            f"{at_most}{_scaled(cost.bytes_forward, 'B')} forward, "
            f"{_scaled(cost.bytes_backward, 'B')} backward, each array once"
        )
        rows.update(self.facts)
        rows.update({f"not {name}": "; ".join(why) for name, why in self.declined.items()})
        width = max(map(len, rows))
        lines = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
        return "\n".join([summary(self.problem, self.device), *lines])

    def _unread(self) -> str:
        return "the mask reads tables" if self.exact else "the lengths lie"


def explain(problem: Problem, operands: Operands, backend: str | None = None) -> Explanation:
    """Describe the plan for a call. An unknown backend raises InvalidCall; refusals are in the answer."""
    device, entries = operands.q.device, registry.entries()
    if backend is not None and backend not in entries:
        raise InvalidCall("backend", repr(backend), f"None or one of {', '.join(map(repr, entries))}")
    declined: dict[str, list[str]] = {}
    chosen: Backend | None = None
    for name, entry in entries.items():
        why = reasons(entry, problem, device)
        if backend is not None and name != backend:
            why = [*why, f'the call asks for backend="{backend}"']
        elif backend is None and entry.backend is not None and entry.backend.rank is None:
            why = [*why, f'runs only if named: backend="{name}"']
        elif not why and chosen is not None:
            why = [f"{chosen.name} is preferred"]
        if why:
            declined[name] = why
        else:
            chosen = entry.backend
    config: Any = None
    facts: dict[str, Any] = {}
    if chosen is not None:
        config = guard(chosen, "configuring", chosen.configure, problem)
        facts.update(guard(chosen, "explaining itself", chosen.explain, problem, config))
    tiles = count_tiles(problem, operands, facts.pop("block_q", _BLOCK), facts.pop("block_k", _BLOCK))
    kept = 1.0 if tiles is None or not tiles.total else 1 - tiles.empty / tiles.total
    lengths, read = None, sequence_lengths(problem, operands)
    if problem.addressing != "dense" and read is not None:
        lengths = list(zip(read[0].tolist(), read[1].tolist(), strict=True))
    name = None if chosen is None else chosen.name
    costs = cost(problem, kept, lengths)
    return Explanation(problem, device, name, config, tiles, costs, facts, declined, read is not None)


def count_tiles(problem: Problem, operands: Operands, block_q: int, block_k: int) -> Tiles | None:
    """Class every tile of a call. Sides are doubled until the grid is small enough to hold."""
    source = problem.program.mask
    mask = None if source is None else text.parse(source)
    tables: Sequence[NDArray[Any]] = ()
    if mask is not None and problem.tables:
        if any(table.device.kind != "cpu" or table.ptr is None for table in operands.tables):
            return None
        tables = [as_numpy(table) for table in operands.tables]
    lengths = sequence_lengths(problem, operands)
    if lengths is None:
        return None
    q_lens, k_lens = lengths
    planes = problem.batch * problem.heads_q
    while planes * -(-problem.seqlen_q // block_q) * -(-problem.seqlen_k // block_k) > _MAX_TILES:
        block_q, block_k = 2 * block_q, 2 * block_k
    grid = -(-q_lens // block_q) * -(-k_lens // block_k)
    total = int(grid.sum()) * problem.heads_q
    if not total:
        return Tiles(block_q, block_k, 0, 0, 0, 0)
    dense = problem.addressing == "dense"
    dims = Dims(
        problem.batch,
        problem.heads_q,
        problem.seqlen_q if dense else q_lens,
        problem.seqlen_k if dense else k_lens,
    )
    classes = tile_classes(mask, dims, tables, block_q, block_k)
    repeats = planes // (classes.shape[0] * classes.shape[1])
    partial = int(np.count_nonzero(classes == PARTIAL)) * repeats
    full = int(np.count_nonzero(classes == FULL)) * repeats
    return Tiles(block_q, block_k, total, total - partial - full, partial, full)


def _scaled(value: float, unit: str) -> str:
    """Three digits with a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} P{unit}"
