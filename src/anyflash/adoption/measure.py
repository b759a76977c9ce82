"""One row, measured: agreement first, and only if it holds, time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from anyflash.adoption import agreement, curve, memory, reach, timing
from anyflash.adoption.row import Result, Role, Row, Workload


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float
    steps: int


QUICK = Effort(rounds=7, seconds=8.0, steps=8)
FULL = Effort(rounds=15, seconds=25.0, steps=40)
Progress = Callable[[str, float], None]


def measure(row: Row, quick: bool, progress: Progress) -> dict[str, Any]:
    """The row's record, as it goes into adoption.json. `progress` takes what is being done and the part done.

    Raises RuntimeError, saying by how much, if our outputs or gradients disagree with the system's own.
    """
    effort = QUICK if quick else FULL
    progress("building", 0.0)
    workload = row.build(quick)
    record: dict[str, Any] = {"workload": workload.description, "dtype": workload.dtype}
    found = _agree(workload, lambda what, part: progress(what, 0.1 + 0.3 * part))
    record["agreement"] = [asdict(a) for a in found]
    for a in found:
        if not a.holds:
            raise RuntimeError(
                f"our {a.kind} err by {a.errors['ours']:.1e} (relative, from float64) and {a.allowed:.1e} is "
                f"allowed: its own err by {a.errors['eager']:.1e} (eager) and {a.errors['best']:.1e} (best)"
            )
    seconds = timing.interleaved(
        workload.step,
        workload.variants,
        effort.rounds,
        effort.seconds,
        lambda n: progress("timing", 0.4 + 0.4 * n / effort.rounds),
    )
    peaks = _peaks(workload, lambda what, part: progress(what, 0.8 + 0.1 * part))
    record["variants"] = [
        {
            "role": v.role,
            "label": v.label,
            "seconds": seconds[v.role],
            "median": statistics.median(seconds[v.role]),
            "peak_bytes": peaks[v.role],
        }
        for v in workload.variants
    ]
    medians = {v["role"]: v["median"] for v in record["variants"]}
    record["speedup"] = {role: medians[role] / medians["ours"] for role in ("eager", "best")}
    if workload.train is not None:
        record["curve"] = curve.train(
            workload, effort.steps, lambda part: progress("training", 0.9 + 0.1 * part)
        )
    if workload.reach is not None:
        record["reach"] = reach.longest(
            workload.reach, workload.variants, lambda part: progress("reach", 0.9 + 0.1 * part)
        )
    return record


def _agree(workload: Workload, progress: Progress) -> list[agreement.Agreement]:
    progress("float64 reference", 0.0)
    reference = workload.reference()
    results: dict[Role, Result] = {}
    for i, variant in enumerate(workload.variants):
        progress(f"agreement: {variant.label}", (i + 1) / (len(workload.variants) + 1))
        with variant.context():
            results[variant.role] = workload.step(variant.role)
    return agreement.compare(reference, results, workload.dtype)


def _peaks(workload: Workload, progress: Progress) -> dict[Role, int]:
    peaks: dict[Role, int] = {}
    for i, variant in enumerate(workload.variants):
        progress(f"memory: {variant.label}", i / len(workload.variants))
        with variant.context():
            peaks[variant.role] = memory.peak_rise(lambda role=variant.role: workload.step(role))
    return peaks
