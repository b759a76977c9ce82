"""A run as Markdown: the machine, how it was measured, goals, every cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from anyflash.bench import goals, summary, timing
from anyflash.bench.agreement import GRADIENT_FACTOR, OUTPUT_FACTOR, PEER_SLACK
from anyflash.bench.run import Report, missing, refused

_HOW = """
Every cell gives the same arrays to everybody, in one process and with the same number of threads. First, each
result is compared with plain attention in float64: outputs may err {out:g} times as much as plain attention
in the cell's own dtype does, gradients {grad:g} times, beside the roundings of the longest sum; ours is
refused beyond that, a peer beyond {slack:g} times that. Only what agrees is timed. Then all take turns: a
turn waits until no thread of another library spins any more, and lasts at least {turn:g} ms or one call; the
order shifts from round to round. Rounds end once the 95 % interval of the ratio is within {spread:.0%} of it,
after {seconds:g} s or {most} rounds, but not before {least}. A peer that is far behind leaves after the first
rounds. What a peer can prepare before a call (dense masks, block masks, padded copies, compiled models) is
not timed.

*ratio* is the best peer's time over ours, the median over rounds; above 1 ours is faster. GFLOP/s count the
matrix products over unmasked pairs, 2 forward and 5 more backward; GB/s count q, k, v and out once. *share*
is that of the machine's ceiling, measured in the same rounds: torch's matrix product in the same dtype (or
float32 where that is faster), or reading memory. Decoding goes around as many sets of arrays as exceed the
caches. Over a KV cache, a call appends the keys and values of its queries and attends to all; pages lie in
no order. In a peer's column: the ratio to it; – where it has no such feature; *missing* where it is not
installed; *wrong* where its result disagrees; *fails* where it raises.
"""


def markdown(report: Report, charts: Sequence[str] = ()) -> str:
    """`charts` are file names, as seen from the report."""
    return "\n".join(
        [
            "# Attention on the CPU: anyflash and its peers",
            "",
            f"Written by `anyflash bench --grid {report['grid']}{_options(report)}`; not edited.",
            "",
            *_machine(report),
            *_disturbed(report),
            *_missing(report),
            *_refused(report),
            *_goals(report),
            *_means(report),
            *[line for chart in charts for line in (f"![{chart}]({chart})", "")],
            *_cells(report),
            *_why_not(report),
            "## How it was measured",
            _how(report),
        ]
    )


def _options(report: Report) -> str:
    only = f" --only '{report['only']}'" if report["only"] else ""
    return only + (" --quick" if report["quick"] else "")


def _machine(report: Report) -> list[str]:
    machine = report["machine"]
    gib = machine["memory_bytes"] / 2**30
    rows = [
        ("processor", f"{machine['processor']} ({machine['architecture']})"),
        ("instruction set", f"{machine['instruction_set']} (torch: {machine['torch_instruction_set']})"),
        ("cores, threads used", f"{machine['cores']}, {report['threads']}"),
        ("last-level cache", f"{machine['last_level_cache_bytes'] >> 20} MiB"),
        ("memory", f"{gib:.0f} GiB"),
        ("system", machine["system"]),
        ("load before", "unknown" if machine["load_before"] is None else f"{machine['load_before']:.2f}"),
        ("versions", ", ".join(f"{name} {v or 'missing'}" for name, v in machine["versions"].items())),
        ("date", machine["date"].replace("T", " ")),
        *[("taken up again", date.replace("T", " ")) for date in report.get("resumed", [])],
    ]
    return ["## Machine", "", *_table(("", ""), rows), ""]


def _disturbed(report: Report) -> list[str]:
    warning = summary.disturbed(report)
    return [f"**{warning}**", ""] if warning else []


def _missing(report: Report) -> list[str]:
    names = missing(report)
    if not names:
        return []
    lines = [f"- {name}" for name in names]
    return ["## Not measured", "", "The run was stopped before these cells.", "", *lines, ""]


def _refused(report: Report) -> list[str]:
    wrong = refused(report)
    if not wrong:
        return []
    lines = [f"- {record['name']}: {record['status']}, {record['why']}" for record in wrong]
    return ["## Not timed", "", "Cells in which anyflash itself failed or disagreed.", "", *lines, ""]


def _goals(report: Report) -> list[str]:
    rows = []
    for goal in goals.GOALS:
        found = goal.compute(report)
        if found is not None:
            target = f"{goal.sense} {goal.show.format(goal.target)}"
            verdict = "yes" if goal.reached(found) else "**no**"
            rows.append((goal.text, target, goal.show.format(found.value), verdict, found.over))
    if not rows:
        return []
    return ["## Goals", "", *_table(("goal", "target", "found", "reached", "over"), rows), ""]


def _means(report: Report) -> list[str]:
    rows = [(group, summary.mean(records)) for group, records in summary.groups(report).items()]
    return ["## Ratio to the best peer", "", *_table(("cells", ""), rows), ""]


def _cells(report: Report) -> list[str]:
    families = summary.families(report)
    lines: list[str] = []
    for group, records in summary.groups(report).items():
        rows = [_cell(summary.row(record), families) for record in records]
        lines += [f"## {group}", "", *_table((*summary.HEADINGS, *families), rows), ""]
    return lines


def _cell(row: summary.Row, families: Sequence[str]) -> tuple[str, ...]:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}" if row.ratio >= 1 else f"**{row.ratio:.2f}**"
    peers = (row.peers.get(family, "") for family in families)
    return row.name, row.ours, row.rate, row.share, row.best, ratio, row.interval, *peers


def _why_not(report: Report) -> list[str]:
    """Each reason why a peer is not in a cell, once, with how many cells it kept it from."""
    counts: dict[tuple[str, str, str], list[str]] = {}
    for record in report["cells"]:
        present = {peer["family"] for peer in record["peers"] if peer["status"] == "timed"}
        for peer in record["peers"]:
            covered = peer["status"] == "lacks" and peer["family"] in present
            if peer["status"] != "timed" and not covered:
                counts.setdefault((peer["name"], peer["status"], peer["why"]), []).append(record["name"])
    if not counts:
        return []
    rows = [
        (name, status, why, cells[0] if len(cells) == 1 else f"{len(cells)} cells")
        for (name, status, why), cells in counts.items()
    ]
    return ["## Peers that did not take part", "", *_table(("peer", "", "why", "where"), rows), ""]


def _how(report: Report) -> str:
    effort = timing.Effort(**report["effort"])
    return _HOW.format(
        out=OUTPUT_FACTOR,
        grad=GRADIENT_FACTOR,
        slack=PEER_SLACK,
        turn=1e3 * effort.turn,
        spread=effort.spread,
        seconds=effort.seconds,
        most=effort.most,
        least=effort.least,
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
