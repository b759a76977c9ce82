"""The results of `anyflash bench` as PNG: the ratio of every cell, and the share of the ceiling against
length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from anyflash.bench.run import Report

_AHEAD, _BEHIND = "#2a7f62", "#c0392b"
_ROW, _HEADING, _WIDTH = 0.2, 0.9, 7.5
_DPI = 110
# Where a ratio's axis is marked, on one that spans less than a factor of _WIDE and on a longer one.
_WIDE = 6.0
_TICKS = ((0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5), (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128))


def draw(report: Report, folder: Path, stem: str) -> list[Path]:
    """Write STEM-ratio.png and STEM-share.png where there is something to show."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, make in (("ratio", _ratios), ("share", _shares)):
        figure: Figure | None = make(report)
        if figure is not None:
            path = folder / f"{stem}-{name}.png"
            figure.savefig(path, dpi=_DPI)
            written.append(path)
    return written


def _ratios(report: Report) -> Any:
    """One panel a group: a bar for each cell, from 1 to its ratio on a logarithmic scale."""
    from matplotlib.figure import Figure

    from anyflash.bench import summary

    panels = {
        group: [record for record in records if record.get("ratio")]
        for group, records in summary.groups(report).items()
    }
    panels = {group: records for group, records in panels.items() if records}
    if not panels:
        return None
    columns = _columns({group: _ROW * len(records) + _HEADING for group, records in panels.items()})
    height = max(sum(heights.values()) for heights in columns)
    figure = Figure(figsize=(_WIDTH * len(columns), height))
    values = [record["ratio"]["median"] for records in panels.values() for record in records]
    limits = 0.9 * min(1.0, *values), 1.1 * max(1.0, *values)
    for i, heights in enumerate(columns):
        top = height
        for group, extent in heights.items():
            inner = (extent - _HEADING) / height
            bottom = (top - extent + 0.45) / height
            axes = figure.add_axes(((i + 0.45) / len(columns), bottom, 0.5 / len(columns), inner))
            _bars(axes, group, panels[group], limits)
            top -= extent
    return figure


def _columns(heights: dict[str, float]) -> list[dict[str, float]]:
    """Panels dealt to as many columns as keep the figure about as high as wide; the shortest gets the
    next."""
    count = max(1, min(len(heights), round((sum(heights.values()) / _WIDTH) ** 0.5)))
    columns: list[dict[str, float]] = [{} for _ in range(count)]
    for group, extent in heights.items():
        min(columns, key=lambda column: sum(column.values()))[group] = extent
    return columns


def _bars(axes: Axes, group: str, records: list[dict[str, Any]], limits: tuple[float, float]) -> None:
    ratios = [record["ratio"]["median"] for record in records]
    places = range(len(records))
    axes.barh(
        places,
        [ratio - 1 for ratio in ratios],
        left=1,
        height=0.7,
        color=[_AHEAD if ratio >= 1 else _BEHIND for ratio in ratios],
    )
    for place, record in zip(places, records, strict=True):
        axes.plot(record["ratio"]["interval"], (place, place), color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(limits)
    ticks = [tick for tick in _TICKS[limits[1] / limits[0] > _WIDE] if limits[0] <= tick <= limits[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(places, [f"{r['name']}  ({r['ratio']['peer']})" for r in records], fontsize=7)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_title(f"{group}: time of the best peer over ours", fontsize=9, loc="left")
    axes.grid(axis="x", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _shares(report: Report) -> Any:
    """One panel a dtype and direction: a colour for each head_dim, causal dashed."""
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str], dict[tuple[int, str], list[tuple[int, float]]]] = {}
    for record in report["cells"]:
        cell = record["cell"]
        if record["status"] == "ok" and record["share"] is not None and cell["group"] == cell["dtype"]:
            panel = lines.setdefault((cell["dtype"], "fwd+bwd" if cell["backward"] else "fwd"), {})
            line = panel.setdefault((cell["head_dim"], cell["variant"]), [])
            line.append((cell["seqlen_q"], 100 * record["share"]))
    if not lines:
        return None
    dtypes = list(dict.fromkeys(dtype for dtype, _ in lines))
    directions = list(dict.fromkeys(direction for _, direction in lines))
    names = sorted({name for panel in lines.values() for name in panel})
    colours = {dim: f"C{i}" for i, dim in enumerate(sorted({dim for dim, _ in names}))}
    lengths = sorted({length for panel in lines.values() for line in panel.values() for length, _ in line})
    figure = Figure(figsize=(4.5 * len(dtypes) + 2, 3.4 * len(directions)), layout="constrained")
    panels = figure.subplots(len(directions), len(dtypes), squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    for (dtype, direction), panel in lines.items():
        axes = panels[directions.index(direction)][dtypes.index(dtype)]
        for dim, variant in names:
            points = sorted(panel.get((dim, variant), []))
            (drawn,) = axes.plot(
                [length for length, _ in points],
                [share for _, share in points],
                "--s" if variant == "causal" else "-o",
                color=colours[dim],
                markersize=4,
            )
            handles[f"{variant}, head_dim {dim}"] = drawn
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=7)
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{dtype} {direction}: % of this machine's matrix product", fontsize=9, loc="left")
        axes.set_xlabel("length")
        axes.grid(linewidth=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=7)
    return figure
