"""The rows that both the terminal's table and the report show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anyflash.bench.goals import geometric_mean, ratios
from anyflash.bench.measure import Record
from anyflash.bench.run import Report

HEADINGS = ("cell", "anyflash", "rate", "share", "best peer", "ratio", "interval")
_IDLE_LOAD = 0.5
# What stands in a peer's column in place of a ratio.
_MARKS = {"missing": "missing", "lacks": "–", "disagrees": "wrong", "failed": "fails"}


@dataclass(frozen=True, slots=True)
class Row:
    """A cell in words. `peers` has a family's best ratio, or why there is none; `ratio` is the figure
    itself."""

    name: str
    ours: str
    rate: str
    share: str
    best: str
    ratio: float | None
    interval: str
    peers: dict[str, str]


def families(report: Report) -> list[str]:
    """The columns of peers, in the order of the records."""
    return list(dict.fromkeys(peer["family"] for record in report["cells"] for peer in record["peers"]))


def groups(report: Report) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in report["cells"]:
        found.setdefault(record["cell"]["group"], []).append(record)
    return found


def disturbed(report: Report) -> str | None:
    """A warning if others were using the machine."""
    load = report["machine"]["load_before"]
    if load is None or load <= _IDLE_LOAD:
        return None
    return f"The machine was not idle (load {load:.2f} before the run): take these figures with caution."


def row(record: Record) -> Row:
    if record["status"] != "ok":
        return Row(record["name"], record["status"], "", "", "", None, "", {})
    ratio = record["ratio"]
    return Row(
        record["name"],
        seconds(record["ours"]["seconds"]),
        rate(record),
        "" if record["share"] is None else f"{record['share']:.0%}",
        ratio["peer"] if ratio else "none",
        ratio["median"] if ratio else None,
        "{:.2f}–{:.2f}".format(*ratio["interval"]) if ratio else "",
        _columns(record["peers"]),
    )


def mean(records: list[Record]) -> str:
    """The geometric mean of a group's ratios in words."""
    found = ratios(record for record in records if record["status"] == "ok")
    if not found:
        return "no peer took part"
    below = sum(ratio < 1 for ratio in found)
    return f"geometric mean {geometric_mean(found):.2f} over {len(found)} cells, {below} below 1"


def rate(record: Record) -> str:
    value, measure = record["ours"]["per_second"], record["cell"]["measure"]
    if measure == "call":
        return ""
    return f"{value / 1e9:.1f} GB/s" if measure == "memory" else f"{value / 1e9:.0f} GFLOP/s"


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _columns(peers: list[dict[str, Any]]) -> dict[str, str]:
    found: dict[str, list[dict[str, Any]]] = {}
    for peer in peers:
        found.setdefault(peer["family"], []).append(peer)
    return {family: _column(ways) for family, ways in found.items()}


def _column(ways: list[dict[str, Any]]) -> str:
    timed = [way["ratio"] for way in ways if way["status"] == "timed"]
    if timed:
        return f"{min(timed):.2f}"
    worst = max(ways, key=lambda way: list(_MARKS).index(way["status"]))
    return _MARKS[worst["status"]]
