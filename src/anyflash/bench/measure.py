"""One cell, measured: agreement first, and only what agrees is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from anyflash.bench import arithmetic, ceiling, inputs, ours, timing, truth
from anyflash.bench.agreement import PEER_SLACK, Expected, Verdict, judge
from anyflash.bench.cells import Cell
from anyflash.bench.inputs import Inputs
from anyflash.bench.peers import registry
from anyflash.bench.peers.base import Peer, Step
from anyflash.bench.timing import Effort, Way
from anyflash.core import settings, threads
from anyflash.core.errors import AnyflashError, InvalidCall

Record = dict[str, Any]
Progress = Callable[[str, float], None]
_CEILING = "ceiling"
_MOST_COPIES = 32


def measure(
    cell: Cell,
    effort: Effort,
    num_threads: int,
    peers: Sequence[Peer],
    progress: Progress = lambda what, part: None,
) -> Record:
    """The cell's record. `progress` takes what is being done and the part done.

    status   "ok"; "disagrees" if our results are refused, "failed" if we raise: nothing is timed then
    ours     seconds (median and samples), GFLOP/s or GB/s, the share of the ceiling
    peers    each with status "timed", "missing", "lacks", "disagrees" or "failed", and why
    ratio    to the best peer: the median over rounds, its 95 % interval, and the peer's name
    """
    record: Record = {"name": cell.name, "cell": asdict(cell), "status": "ok", "why": None, "peers": []}
    with _threads(cell.threads or num_threads):
        record["threads"] = torch.get_num_threads()
        progress("inputs", 0.0)
        made = _copies(cell)
        record["flops"], record["bytes"] = arithmetic.flops(made[0]), arithmetic.nbytes(made[0])
        progress("truth", 0.05)
        gate = _Gate(made[0])
        progress("agreement: anyflash", 0.3)
        try:
            verdict, way = _enter(ours.prepare, made, gate.ours, "ours")
        except (AnyflashError, RuntimeError) as error:
            return record | {"status": "failed", "why": _first_line(error)}
        record["ours"] = {"error": verdict.error, "of_bound": verdict.ratio}
        if way is None:
            return record | {"status": "disagrees", "why": verdict.complaint}
        ways = {ours.NAME: way}
        for i, peer in enumerate(peers):
            progress(f"agreement: {peer.name}", 0.35 + 0.25 * i / len(peers))
            entry, way = _admit(peer, made, gate)
            record["peers"].append(entry)
            if way is not None:
                ways[peer.name] = way
        limit = _limit(cell)
        if limit is not None:
            ways[_CEILING] = Way("ceiling", [limit.call])
        timing.interleave(ways, effort, lambda part: progress("timing", 0.6 + 0.4 * part))
    return record | _figures(record, ways, limit)


class _Gate:
    """What results are compared with. With dropout, ours is held to its own random numbers and the others,
    whose numbers are theirs, to attention without it."""

    def __init__(self, given: Inputs) -> None:
        self._given = given
        self.peers = self._expected(None)
        keep = ours.kept(given)
        self.ours = self.peers if keep is None else self._expected(keep)

    def _expected(self, keep: torch.Tensor | None) -> Expected:
        cell = self._given.cell
        exact, plain = (truth.attention(self._given, a, keep) for a in (truth.EXACT, truth.plain(cell.dtype)))
        group = cell.heads // cell.heads_kv
        return Expected(exact, plain, max(group * cell.seqlen_q, cell.seqlen_k))


def _enter(
    prepare: Callable[[Inputs], Step], made: Sequence[Inputs], expected: Expected, role: timing.Role
) -> tuple[Verdict, Way | None]:
    """Whether a way's results agree, and if so, the way."""
    known = role == "ours" or not made[0].dropout_p
    checked = prepare(made[0] if known else replace(made[0], dropout_p=0.0))
    with checked.context():
        verdict = judge(checked.results(checked.call()), expected, 1.0 if role == "ours" else PEER_SLACK)
    if not verdict.agrees:
        return verdict, None
    first = checked if known else prepare(made[0])
    steps = [first, *map(prepare, made[1:])]
    return verdict, Way(role, [step.call for step in steps], first.context)


def _admit(peer: Peer, made: Sequence[Inputs], gate: _Gate) -> tuple[Record, Way | None]:
    entry: Record = {"name": peer.name, "family": peer.family, "status": "timed", "why": None}
    if registry.version(peer.package) is None:
        return entry | {"status": "missing", "why": f"{peer.package} is not installed"}, None
    lacking = peer.lacks(made[0].cell)
    if lacking is not None:
        return entry | {"status": "lacks", "why": lacking}, None
    # Another package may fail in any way; the table then shows how.
    try:
        verdict, way = _enter(peer.prepare, made, gate.peers, "peer")
    except Exception as error:  # noqa: BLE001
        return entry | {"status": "failed", "why": _first_line(error)}, None
    entry |= {"error": verdict.error, "of_bound": verdict.ratio}
    return (
        (entry, way) if way is not None else (entry | {"status": "disagrees", "why": verdict.complaint}, None)
    )


def _copies(cell: Cell) -> list[Inputs]:
    """One set of arrays; where memory is measured, as many as exceed every cache twice, as the layers of a
    model do."""
    first = inputs.make(cell)
    if cell.measure != "memory":
        return [first]
    count = 2 * ceiling.last_level_cache() // arithmetic.nbytes(first) + 1
    return [first, *(inputs.make(cell, seed) for seed in range(1, min(count, _MOST_COPIES)))]


def _limit(cell: Cell) -> ceiling.Ceiling | None:
    if cell.measure == "call":
        return None
    return ceiling.memory() if cell.measure == "memory" else ceiling.products(cell.dtype)


def _figures(record: Record, ways: dict[str, Way], limit: ceiling.Ceiling | None) -> Record:
    own, best = ways[ours.NAME], timing.best_peer(ways)
    amount = record["bytes"] if record["cell"]["measure"] == "memory" else record["flops"]
    found: Record = {"ours": record["ours"] | _times(own) | {"per_second": amount / own.median}}
    found["peers"] = [
        entry | _times(ways[entry["name"]]) | {"ratio": _ratio(own, ways[entry["name"]])["median"]}
        if entry["name"] in ways
        else entry
        for entry in record["peers"]
    ]
    found["ratio"] = None if best is None else {"peer": best, **_ratio(own, ways[best])}
    found["ceiling"] = found["share"] = None
    if limit is not None:
        reached = limit.amount / ways[_CEILING].median
        found["ceiling"] = {"name": limit.name, "per_second": reached}
        found["share"] = amount / own.median / reached
    return found


def _times(way: Way) -> Record:
    return {"seconds": way.median, "samples": [float(f"{sample:.4g}") for sample in way.samples]}


def _ratio(own: Way, other: Way) -> Record:
    samples = timing.ratios(own, other)
    return {"median": statistics.median(samples), "interval": timing.interval(samples)}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Everybody uses `count` threads: torch is told, and we and the others follow torch."""
    fixed = settings.num_threads()
    if fixed not in (None, count):
        raise InvalidCall(
            "ANYFLASH_NUM_THREADS",
            str(fixed),
            f"unset or {count}",
            "It would set our threads apart from the peers'",
        )
    before = torch.get_num_threads()
    threads.set_provider(torch.get_num_threads)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
