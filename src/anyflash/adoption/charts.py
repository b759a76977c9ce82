"""Bars and dots as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_HEADING = 26
_BAR, _GAP = 20, 12
_LINE = 30
_LONGEST = 72  # characters of a row's label


@dataclass(frozen=True, slots=True)
class Bar:
    """`role` is the CSS class; `samples` are drawn as ticks over the bar."""

    role: str
    label: str
    value: float
    samples: Sequence[float] = ()


def bars(heading: str, rows: Sequence[Bar], show: Callable[[float], str]) -> str:
    """Horizontal bars from 0, one a variant, each with its value."""
    width, label, value = 460, 92, 84
    unit = (width - label - value) / (max(s for r in rows for s in (r.value, *r.samples)) or 1.0)
    parts = [_text(heading, 0, 13, "heading")]
    top = _HEADING
    for row in rows:
        end = unit * max([row.value, *row.samples])
        middle = top + _BAR / 2
        length = max(unit * row.value, 1.5)
        parts.append(_text(row.label, label - 10, middle, "label", "end"))
        parts.append(_tag("rect", f"bar {row.role}", x=label, y=top, width=length, height=_BAR, rx=3))
        for s in row.samples:
            x = label + unit * s
            parts.append(_tag("line", "sample", x1=x, x2=x, y1=top + 4, y2=top + _BAR - 4))
        parts.append(_text(show(row.value), label + end + 8, middle, f"value {row.role}"))
        top += _BAR + _GAP
    return _svg(width, top, heading, parts)


def ratios(heading: str, rows: Sequence[tuple[str, float, float]]) -> str:
    """For each row (title, against eager, against best) two dots on one logarithmic scale, with a line at 1,
    where the two are alike."""
    width, label, right = 960, 490, 104
    values = [1.0, *(v for _, eager, best in rows for v in (eager, best))]
    low, high = math.log2(0.92 * min(values)), math.log2(1.05 * max(values))
    unit = (width - label - right) / (high - low)

    def place(value: float) -> float:
        return label + unit * (math.log2(value) - low)

    top = _HEADING + 8
    bottom = top + _LINE * len(rows)
    parts = [_text(heading, 0, 13, "heading")]
    for tick in (2.0**power for power in range(math.ceil(low), math.floor(high) + 1)):
        x = place(tick)
        parts.append(_tag("line", "grid one" if tick == 1 else "grid", x1=x, x2=x, y1=top - 6, y2=bottom))
        parts.append(_text(f"{tick:g}×", x, bottom + 14, "tick", "middle"))
    for i, (title, eager, best) in enumerate(rows):
        y = top + _LINE * (i + 0.5)
        near, far = sorted((eager, best))
        parts.append(_text(_shortened(title), label - 14, y, "label", "end"))
        parts.append(_tag("line", "span", x1=place(near), x2=place(far), y1=y, y2=y))
        for role, value in (("eager", eager), ("best", best)):
            note = f"against {role}: {value:.2f}×"
            parts.append(_tag("circle", f"dot {role}", note, cx=place(value), cy=y, r=6))
        parts.append(_text(f"{near:.2f}× {far:.2f}×", place(far) + 14, y, "value"))
    return _svg(width, bottom + 24, heading, parts)


def _shortened(title: str) -> str:
    return title if len(title) <= _LONGEST else title[: _LONGEST - 1] + "…"


def losses(heading: str, curves: Mapping[str, Sequence[float]]) -> str:
    """The loss of each step, one line a role; ours is drawn last and thin, so that the one below shows."""
    width, height, left, right = 960, 190, 60, 16
    values = [v for curve in curves.values() for v in curve]
    low, high = min(values), max(values)
    last = max(max(len(curve) for curve in curves.values()) - 1, 1)
    top, bottom = _HEADING + 8, height - 22
    x_unit, y_unit = (width - left - right) / last, (bottom - top) / ((high - low) or 1.0)
    parts = [_text(heading, 0, 13, "heading")]
    for value in (low, (low + high) / 2, high):
        y = bottom - y_unit * (value - low)
        parts.append(_tag("line", "grid", x1=left, x2=width - right, y1=y, y2=y))
        parts.append(_text(f"{value:.3g}", left - 8, y, "tick", "end"))
    steps = sorted({0, last // 2, last})
    parts += [_text(str(step), left + x_unit * step, bottom + 14, "tick", "middle") for step in steps]
    for role, curve in curves.items():
        points = " ".join(
            f"{left + x_unit * i:.5g},{bottom - y_unit * (v - low):.5g}" for i, v in enumerate(curve)
        )
        parts.append(f'<polyline class="curve {role}" points="{points}"/>')
    return _svg(width, height, heading, parts)


def standalone(svg: str, style: str) -> str:
    """A chart as a file of its own: with its size, its namespace and the style sheet."""
    width, height = svg.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    return svg.replace("<svg ", head, 1).replace(">", f"><style>{style}</style>", 1) + "\n"


def _tag(name: str, css: str, note: str = "", **attributes: float) -> str:
    values = "".join(f' {key}="{value:.5g}"' for key, value in attributes.items())
    inside = f"<title>{escape(note)}</title>" if note else ""
    return f'<{name} class="{css}"{values}>{inside}</{name}>'


def _text(text: str, x: float, y: float, css: str, anchor: str = "start") -> str:
    return f'<text class="{css}" x="{x:.5g}" y="{y:.5g}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
    return head + "".join(parts) + "</svg>"
