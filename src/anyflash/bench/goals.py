"""What the CPU kernel should reach, each goal computed from the records of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anyflash.bench.measure import Record
from anyflash.bench.run import Report

Compute = Callable[[Report], "Found | None"]


@dataclass(frozen=True, slots=True)
class Found:
    """A figure and what it was taken over."""

    value: float
    over: str


@dataclass(frozen=True, slots=True)
class Goal:
    """`compute` gives None where the run has no cell for it. `show` formats the figure."""

    text: str
    sense: Literal["at least", "at most"]
    target: float
    compute: Compute
    show: str = "{:.2f}"

    def reached(self, found: Found) -> bool:
        return found.value >= self.target if self.sense == "at least" else found.value <= self.target


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def ratios(records: Iterable[Record]) -> list[float]:
    """To the best peer, of the records that have one."""
    return [record["ratio"]["median"] for record in records if record.get("ratio")]


def pick(report: Report, where: Callable[[dict[str, Any]], bool]) -> list[Record]:
    """Measured records whose cell satisfies `where`."""
    return [r for r in report["cells"] if r["status"] == "ok" and where(r["cell"])]


def _least_ratio(report: Report) -> Found | None:
    found = [r for r in pick(report, lambda c: True) if r["ratio"]]
    if not found:
        return None
    worst = min(found, key=lambda r: r["ratio"]["median"])
    below = sum(r["ratio"]["median"] < 1 for r in found)
    return Found(worst["ratio"]["median"], f"{worst['name']}; {below} of {len(found)} cells are below 1")


def _mean(where: Callable[[dict[str, Any]], bool]) -> Compute:
    def compute(report: Report) -> Found | None:
        found = ratios(pick(report, where))
        return Found(geometric_mean(found), f"{len(found)} cells") if found else None

    return compute


def _share(where: Callable[[dict[str, Any]], bool]) -> Compute:
    def compute(report: Report) -> Found | None:
        found = [r for r in pick(report, where) if r["share"] is not None]
        if not found:
            return None
        worst = min(found, key=lambda r: r["share"])
        return Found(worst["share"], f"least of {len(found)}: {worst['name']}")

    return compute


def _spread(where: Callable[[dict[str, Any]], bool], cost: Callable[[Record], float]) -> Compute:
    """How much the greatest cost exceeds the least."""

    def compute(report: Report) -> Found | None:
        found = {r["name"]: cost(r) for r in pick(report, where)}
        if len(found) < 2:
            return None
        low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
        return Found(found[high] / found[low] - 1, f"{high} against {low}")

    return compute


def _pairs(
    first: Callable[[dict[str, Any]], bool], second: Callable[[dict[str, Any]], bool], but: str, worst: Any
) -> Compute:
    """The worst time of a cell of `first` over that of the cell of `second` which differs only in `but`."""

    def compute(report: Report) -> Found | None:
        partners = {_without(r["cell"], but): r for r in pick(report, second)}
        found = {
            r["name"]: r["ours"]["seconds"] / partners[_without(r["cell"], but)]["ours"]["seconds"]
            for r in pick(report, first)
            if _without(r["cell"], but) in partners
        }
        if not found:
            return None
        name = worst(found, key=found.__getitem__)
        return Found(found[name], f"worst of {len(found)}: {name}")

    return compute


def _without(cell: dict[str, Any], field: str) -> tuple[Any, ...]:
    return tuple(str(value) for name, value in cell.items() if name != field)


def _microseconds(frontend: str) -> Compute:
    def compute(report: Report) -> Found | None:
        found = pick(
            report,
            lambda c: (
                (c["heads"], c["seqlen_q"], c["frontend"], c["backward"], c["measure"])
                == (1, 16, frontend, False, "call")
            ),
        )
        return Found(1e6 * found[0]["ours"]["seconds"], found[0]["name"]) if found else None

    return compute


def _startup(what: str) -> Compute:
    def compute(report: Report) -> Found | None:
        times = report["startup"]
        return Found(times[what], f"importing LLVM before it: {times['load_llvm']:.3f} s") if times else None

    return compute


def _on(target: str) -> Callable[[Report], bool]:
    return lambda report: report["machine"]["instruction_set"] == target


def _only_on(here: Callable[[Report], bool], compute: Compute) -> Compute:
    return lambda report: compute(report) if here(report) else None


def _main(
    dtype: str, variant: str | None = None, backward: bool | None = None
) -> Callable[[dict[str, Any]], bool]:
    """Cells of the grid's main part: one dtype, all lengths and head_dims."""
    return lambda c: (
        c["group"] == dtype
        and (variant is None or c["variant"] == variant)
        and (backward is None or c["backward"] == backward)
    )


def _at(length: int, dim: int, backward: bool) -> Callable[[dict[str, Any]], bool]:
    return lambda c: (
        (c["seqlen_q"], c["head_dim"], c["backward"], c["variant"]) == (length, dim, backward, "full")
    )


def _both(*conditions: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], bool]:
    return lambda c: all(condition(c) for condition in conditions)


_amx = _on("amx")

GOALS = (
    Goal("every cell: ratio to the best peer", "at least", 1.0, _least_ratio),
    Goal("float32 forward: mean ratio", "at least", 1.25, _mean(_main("float32", "full", False))),
    Goal("float32 forward and backward: mean ratio", "at least", 1.5, _mean(_main("float32", "full", True))),
    Goal("float32 causal: mean ratio", "at least", 1.5, _mean(_main("float32", "causal"))),
    Goal("bfloat16 with AMX: mean ratio", "at least", 2.5, _only_on(_amx, _mean(_main("bfloat16")))),
    Goal(
        "bfloat16 without AMX: mean ratio",
        "at least",
        1.3,
        _only_on(lambda report: not _amx(report), _mean(_main("bfloat16"))),
    ),
    Goal(
        "masks, biases, windows, varlen and dropout: mean ratio",
        "at least",
        4.0,
        _mean(lambda c: c["group"] in ("variants", "varlen")),
    ),
    Goal("Evoformer shapes: mean ratio", "at least", 3.0, _mean(lambda c: c["group"] == "Evoformer")),
    Goal(
        "float32 forward at 4096, head_dim 128: share of GEMM",
        "at least",
        0.85,
        _share(_both(_main("float32"), _at(4096, 128, False))),
        "{:.0%}",
    ),
    Goal(
        "float32 forward and backward at 4096, head_dim 128: share of GEMM",
        "at least",
        0.75,
        _share(_both(_main("float32"), _at(4096, 128, True))),
        "{:.0%}",
    ),
    Goal(
        "bfloat16 forward with AMX at 4096, head_dim 128: share of GEMM",
        "at least",
        0.5,
        _only_on(_amx, _share(_both(_main("bfloat16"), _at(4096, 128, False)))),
        "{:.0%}",
    ),
    Goal(
        "decoding from 8192 keys: share of memory read speed",
        "at least",
        0.85,
        _share(lambda c: c["group"] == "decode" and c["seqlen_k"] >= 8192),
        "{:.0%}",
    ),
    Goal(
        "float32 forward, head_dim 64, 1024 to 16384: spread of the time per score",
        "at most",
        0.15,
        _spread(
            lambda c: _main("float32", "full", False)(c) and c["seqlen_q"] >= 1024 and c["head_dim"] == 64,
            lambda r: r["ours"]["seconds"] / r["flops"],
        ),
        "{:.0%}",
    ),
    Goal(
        "window, forward, 2048 to 8192: spread of the time per query",
        "at most",
        0.15,
        _spread(
            lambda c: c["variant"] == "window" and not c["backward"],
            lambda r: (
                r["ours"]["seconds"] / (r["cell"]["batch"] * r["cell"]["heads"] * r["cell"]["seqlen_q"])
            ),
        ),
        "{:.0%}",
    ),
    Goal(
        "float32 forward at 4096: time of causal over that of full",
        "at most",
        0.58,
        _pairs(
            lambda c: _main("float32", "causal", False)(c) and c["seqlen_q"] == 4096,
            lambda c: _main("float32", "full", False)(c) and c["seqlen_q"] == 4096,
            "variant",
            max,
        ),
    ),
    Goal(
        "two threads: speed-up over one",
        "at least",
        1.85,
        _pairs(
            lambda c: c["group"] == "threads" and c["threads"] == 1,
            lambda c: c["group"] == "threads" and c["threads"] == 2,
            "threads",
            min,
        ),
    ),
    Goal("one small call from numpy, microseconds", "at most", 15.0, _microseconds("numpy"), "{:.1f}"),
    Goal("one small call from torch, microseconds", "at most", 25.0, _microseconds("torch"), "{:.1f}"),
    Goal("first call of a problem, compiling, seconds", "at most", 0.5, _startup("compile"), "{:.3f}"),
    Goal(
        "first call in a new process, from the cache, seconds", "at most", 0.02, _startup("cached"), "{:.3f}"
    ),
)
