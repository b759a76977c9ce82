"""adoption.html: one file, no outside resource, readable without anyflash."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from anyflash.adoption import claims, curve, reach, units
from anyflash.adoption.charts import Bar, bars, losses, ratios

_BUSY = 0.5
_STYLE = Path(__file__).with_name("page.css")


def render(report: dict[str, Any]) -> str:
    """The page of a report, as `record.report` makes it."""
    rows = report["rows"]
    measured = [r for r in rows if r["status"] == "ok"]
    parts = [_head(report)]
    if measured:
        parts.append(_overview(measured))
        parts += [f"<h2>{escape(s)}</h2>" + _claim(s) + _cards(measured, s) for s in systems(measured)]
        parts.append("<h2>All figures</h2>" + _table(measured))
    failed = [r for r in rows if r["status"] == "failed"]
    if failed:
        parts.append("<h2>Failed</h2>" + "".join(_failure(r) for r in failed))
    absent = [r for r in rows if r["status"] == "absent"]
    if absent:
        parts.append("<h2>Not installed here</h2>" + _absent(absent))
    parts.append(_how(report))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>anyflash adoption</title><style>{style()}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def systems(rows: list[dict[str, Any]]) -> list[str]:
    """In the order of their first rows."""
    return list(dict.fromkeys(r["system"] for r in rows))


def style() -> str:
    """The style sheet of the page and of its charts."""
    return _STYLE.read_text(encoding="utf-8")


def facts(report: dict[str, Any]) -> dict[str, str]:
    """The machine of a report, as a list of terms."""
    machine = report["machine"]
    memory = machine["memory_bytes"]
    found = {
        "Processor": f"{machine['cpu']} ({machine['architecture']})",
        "Usable cores": str(machine["cores"]),
        "Memory": units.size(memory) if memory else "unknown",
        "anyflash kernels": machine["kernels"] or "none for this processor",
        "System": machine["system"],
        "Date": machine["date"].replace("T", " "),
        "Versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    }
    if "taken_up" in report:
        found["Taken up again"] = ", ".join(date.replace("T", " ") for date in report["taken_up"])
    if machine["load"] is not None and machine["load"] > _BUSY:
        found["Other load"] = f"{machine['load']:.1f} processes before the run: figures are less sure"
    return found


def _head(report: dict[str, Any]) -> str:
    items = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts(report).items())
    size = " A quick run: smaller workloads, fewer repeats." if report["quick"] else ""
    return (
        "<h1>anyflash adoption</h1>"
        f'<p class="lead">Real systems on real input, with their own attention and with ours.{size}</p>'
        f'<dl class="facts">{items}</dl>'
    )


def overview(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The two charts of all rows: speed-up, and peak memory as a part of theirs."""
    speed = [(_name(r), r["speedup"]["eager"], r["speedup"]["best"]) for r in rows]
    memory = []
    for r in rows:
        peak = {v["role"]: max(v["peak_bytes"], 1) for v in r["variants"]}
        memory.append((_name(r), peak["ours"] / peak["eager"], peak["ours"] / peak["best"]))
    return (
        ratios("Speed-up of the whole step (right of the dashed line is faster)", speed),
        ratios("Peak memory of the step, as a part of theirs (left of it is less)", memory),
    )


def _name(row: dict[str, Any]) -> str:
    return f"{row['system'].removeprefix('Hugging Face ')}: {row['title']}"


def _overview(rows: list[dict[str, Any]]) -> str:
    legend = (
        '<p class="legend"><i style="background:var(--eager)"></i>against the system\'s eager attention'
        '<i style="background:var(--best)"></i>against its best own attention</p>'
    )
    return '<h2>At a glance</h2><div class="card">' + legend + "".join(overview(rows)) + "</div>"


def _cards(rows: list[dict[str, Any]], system: str) -> str:
    return "".join(_card(r) for r in rows if r["system"] == system)


def _claim(system: str) -> str:
    claim = claims.of(system)
    if claim is None:
        return ""
    return (
        f'<p class="claim"><b>The claim:</b> {escape(claim.text)} '
        f'<span class="note">({escape(claim.source)})</span> <b>Here:</b> {escape(claim.here)}</p>'
    )


def _card(row: dict[str, Any]) -> str:
    times = [Bar(v["role"], v["label"], v["median"], v["seconds"]) for v in row["variants"]]
    peaks = [Bar(v["role"], v["label"], v["peak_bytes"]) for v in row["variants"]]
    factors = "".join(
        f'<div><b class="{_gain(row["speedup"][role])}">{units.factor(row["speedup"][role])}</b>'
        f"<span>over {escape(_label(row, role))}</span></div>"
        for role in ("eager", "best")
    )
    return (
        f'<section class="card"><header><div><h3>{escape(row["title"])}</h3>'
        f'<p class="note">{escape(row["workload"])}. {escape(versions(row))}</p></div>'
        f'<div class="factors">{factors}</div></header>'
        f'<div class="charts">{bars("time of a step: median, and each one measured", times, units.seconds)}'
        f"{bars('peak memory of a step', peaks, units.size)}</div>"
        f'{_curve(row)}{_reach(row)}<p class="note">{escape(agreed(row))}</p></section>'
    )


def _curve(row: dict[str, Any]) -> str:
    if "curve" not in row:
        return ""
    found = row["curve"]
    return losses(curve.sentence(found), found["losses"])


def _reach(row: dict[str, Any]) -> str:
    return f"<p>{escape(reach.sentence(row))}</p>" if "reach" in row else ""


def _label(row: dict[str, Any], role: str) -> str:
    return next(v["label"] for v in row["variants"] if v["role"] == role)


def versions(row: dict[str, Any]) -> str:
    """What the row ran on."""
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items()) + "."


def agreed(row: dict[str, Any]) -> str:
    """How near ours is, in a sentence for outputs and one for gradients."""
    parts = []
    for a in row["agreement"]:
        errors = a["errors"]
        parts.append(
            f"{a['kind'].capitalize()}: greatest difference from eager {a['difference']:.1e} (values up to "
            f"{a['of']:.3g}); error from float64 {errors['ours']:.1e}, that of eager {errors['eager']:.1e}, "
            f"of its best {errors['best']:.1e}."
        )
    return " ".join(parts)


def _gain(value: float) -> str:
    return "gain" if value >= 1 else "loss"


def _table(rows: list[dict[str, Any]]) -> str:
    columns = (
        "system and workload",
        "eager",
        "best own",
        "anyflash",
        "over eager",
        "over best",
        "memory eager",
        "memory best",
        "memory anyflash",
        "greatest difference",
    )
    lines = []
    for r in rows:
        of = {v["role"]: v for v in r["variants"]}
        cells = [units.seconds(of[role]["median"]) for role in ("eager", "best", "ours")]
        cells += [
            f'<span class="{_gain(r["speedup"][role])}">{units.factor(r["speedup"][role])}</span>'
            for role in ("eager", "best")
        ]
        cells += [units.size(of[role]["peak_bytes"]) for role in ("eager", "best", "ours")]
        cells.append("<br>".join(f"{a['difference']:.1e} {a['kind']}" for a in r["agreement"]))
        name = f'{escape(r["system"])}<br><span class="note">{escape(r["title"])}</span>'
        lines.append("<tr><td>" + "</td><td>".join([name, *cells]) + "</td></tr>")
    head = "".join(f"<th>{c}</th>" for c in columns)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="card scroll">{table}</div>'


def _failure(row: dict[str, Any]) -> str:
    log = "\n".join(row.get("log", []))
    return (
        f'<section class="card failed"><h3>{escape(row["system"])}: {escape(row["title"])}</h3>'
        f"<p>{escape(row['why'])}</p>" + (f"<pre>{escape(log)}</pre>" if log else "") + "</section>"
    )


def _absent(rows: list[dict[str, Any]]) -> str:
    lines = "".join(
        f"<p><b>{escape(r['system'])}</b>, {escape(r['title'])}: "
        + ", ".join(f"<code>{escape(how)}</code>" for how in r["how_to_install"])
        + "</p>"
        for r in rows
    )
    return f'<div class="card">{lines}</div>'


def _how(report: dict[str, Any]) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in report["how"])
    return f'<h2>How this was measured</h2><div class="card">{lines}</div>'
