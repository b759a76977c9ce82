"""docs/adoption.md: a run as Markdown, with its charts as SVG files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anyflash.adoption import claims, curve, page, reach, units
from anyflash.adoption.charts import losses, standalone

_HEAD = """# Adoption: real systems with their own attention and with ours

Written by `anyflash adoption --report docs/adoption.md`; every figure is of one run on the machine below.
{quick}
Time and peak memory are of one whole step: the model around the attention is in them. *Eager* is the system's
plain attention, *best own* the fastest that it brings for this workload on this machine.

{facts}

![Speed-up of every row over eager and over the best own attention]({stem}-speed.svg)

![Peak memory of every row as a part of that of eager and of the best own attention]({stem}-memory.svg)
"""
_COLUMNS = (
    "workload",
    "eager",
    "best own",
    "anyflash",
    "over eager",
    "over best",
    "memory: eager, best, anyflash",
    "greatest difference",
)


def write(report: dict[str, Any], file: Path) -> list[Path]:
    """The Markdown `file` and its charts; their paths."""
    file.parent.mkdir(parents=True, exist_ok=True)
    measured = [r for r in report["rows"] if r["status"] == "ok"]
    charts: dict[str, str] = {}
    if measured:
        charts |= zip(("speed", "memory"), page.overview(measured), strict=True)
    for row in measured:
        if "curve" in row:
            charts[row["name"]] = losses(curve.sentence(row["curve"]), row["curve"]["losses"])
    written = [file]
    for name, chart in charts.items():
        beside = file.with_name(f"{file.stem}-{name}.svg")
        beside.write_text(standalone(chart, page.style()), encoding="utf-8")
        written.append(beside)
    file.write_text(_text(report, measured, file.stem), encoding="utf-8")
    return written


def _text(report: dict[str, Any], measured: list[dict[str, Any]], stem: str) -> str:
    quick = "A quick run: smaller workloads, fewer repeats.\n" if report["quick"] else ""
    facts = "\n".join(f"- {term}: {what}" for term, what in page.facts(report).items())
    parts = [_HEAD.format(quick=quick, facts=facts, stem=stem)]
    parts += [_system(s, [r for r in measured if r["system"] == s], stem) for s in page.systems(measured)]
    left = [r for r in report["rows"] if r["status"] != "ok"]
    if left:
        parts.append("## Not measured in this run\n\n" + "\n".join(map(_left, left)) + "\n")
    parts.append("## How this was measured\n\n" + "\n\n".join(report["how"]) + "\n")
    return "\n".join(parts)


def _system(name: str, rows: list[dict[str, Any]], stem: str) -> str:
    parts = [f"## {name}"]
    claim = claims.of(name)
    if claim is not None:
        parts.append(f"The claim: {claim.text} ({claim.source}) Here: {claim.here}")
    table = ["| " + " | ".join(_COLUMNS) + " |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    table += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    parts.append("\n".join(table))
    for row in rows:
        parts.append(f"*{row['title']}*: {row['workload']}. {page.versions(row)} {page.agreed(row)}")
        if "reach" in row:
            parts.append(reach.sentence(row))
        if "curve" in row:
            parts.append(f"![{curve.sentence(row['curve'])}]({stem}-{row['name']}.svg)")
    return "\n\n".join(parts) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    of = {v["role"]: v for v in row["variants"]}
    roles = ("eager", "best", "ours")
    return [
        row["title"],
        *(f"{units.seconds(of[role]['median'])}" for role in roles),
        *(units.factor(row["speedup"][role]) for role in roles[:2]),
        ", ".join(units.size(of[role]["peak_bytes"]) for role in roles),
        ", ".join(f"{a['difference']:.1e} {a['kind']}" for a in row["agreement"]),
    ]


def _left(row: dict[str, Any]) -> str:
    head = f"- {row['system']}, {row['title']}: "
    if row["status"] == "failed":
        return head + "failed. " + row["why"]
    return head + "not installed there. " + "; ".join(f"`{how}`" for how in row["how_to_install"])
