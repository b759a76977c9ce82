"""A mask as a picture: each (query, key) cell, and the class of each tile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from anyflash.semantics.tiles import EMPTY, FULL, PARTIAL

NAMES = ("empty", "partial", "full")
_GLYPHS = " ▄▀█"
_TILE_GLYPHS = " ▒█"
_STYLES = ("default", "yellow on grey15", "green")
# Allowed and forbidden cells of each class, as RGB. Red shows only where a class is wrong.
_ALLOWED = ((0.84, 0.15, 0.16), (0.93, 0.66, 0.20), (0.17, 0.55, 0.34))
_FORBIDDEN = ((0.97, 0.97, 0.97), (1.00, 0.93, 0.78), (0.84, 0.15, 0.16))
_GRID_UP_TO = 64  # tiles along the longer side; beyond that lines would cover the cells


@dataclass(frozen=True)
class Picture:
    """A mask of q_len x k_len cells cut into tiles of `block` (queries, keys).

    classes   (tiles along q, tiles along k) of EMPTY, PARTIAL, FULL
    cells     (q_len, k_len) bool, or None where there are too many to look at
    """

    q_len: int
    k_len: int
    block: tuple[int, int]
    classes: NDArray[Any]
    cells: NDArray[np.bool_] | None

    def counts(self) -> dict[str, int]:
        """How many tiles are of each class."""
        return {name: int((self.classes == code).sum()) for code, name in enumerate(NAMES)}

    def summary(self) -> str:
        counts, tiles = self.counts(), self.classes.size
        computed = tiles - counts["empty"]
        share = f"{computed / tiles:.0%}" if tiles else "none"
        return (
            f"{self.q_len} queries x {self.k_len} keys, tiles of {self.block[0]} x {self.block[1]}: "
            + ", ".join(f"{number} {name}" for name, number in counts.items())
            + f"; {computed} of {tiles} tiles are computed ({share})"
        )


def terminal(picture: Picture, width: int) -> Text:
    """The picture for a terminal of `width` columns: cells if they fit, else tiles, grouped if need be."""
    if picture.cells is not None and picture.k_len <= width:
        return _cells(picture, picture.cells)
    return _tiles(picture.classes, width)


def _cells(picture: Picture, cells: NDArray[np.bool_]) -> Text:
    """One character a key and two queries, coloured by the class of the tile."""
    text = Text()
    (block_q, block_k), below = picture.block, np.zeros(picture.k_len, np.bool_)
    for row in range(0, picture.q_len, 2):
        lower = cells[row + 1] if row + 1 < picture.q_len else below
        for key in range(picture.k_len):
            glyph = _GLYPHS[2 * int(cells[row, key]) + int(lower[key])]
            text.append(glyph, _STYLES[picture.classes[row // block_q, key // block_k]])
        text.append("\n")
    return text


def _tiles(classes: NDArray[Any], width: int) -> Text:
    """One character a group of tiles, twice as many along q, because characters are tall."""
    text = Text()
    step = max(1, -(-classes.shape[1] // width))
    rows = 2 * step if step > 1 else 1
    for top in range(0, classes.shape[0], rows):
        for left in range(0, classes.shape[1], step):
            group = classes[top : top + rows, left : left + step]
            code = int(group.flat[0]) if (group == group.flat[0]).all() else PARTIAL
            text.append(_TILE_GLYPHS[code], _STYLES[code])
        text.append("\n")
    return text


def save(picture: Picture, path: Path, title: str) -> None:
    """Write the picture as an image; the suffix names the format (png, svg, pdf)."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = np.empty((*picture.classes.shape, 3)) if picture.cells is None else None
    if colours is None:
        assert picture.cells is not None
        spread = picture.classes.repeat(picture.block[0], 0).repeat(picture.block[1], 1)
        spread = spread[: picture.q_len, : picture.k_len]
        colours = np.where(picture.cells[..., None], np.array(_ALLOWED)[spread], np.array(_FORBIDDEN)[spread])
    else:
        colours = np.array([_FORBIDDEN[EMPTY], _ALLOWED[PARTIAL], _ALLOWED[FULL]])[picture.classes]
    figure = Figure(figsize=(7, 7.6), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(colours, extent=(0, picture.k_len, picture.q_len, 0), interpolation="nearest", aspect="auto")
    if max(picture.classes.shape) <= _GRID_UP_TO:
        axes.hlines(
            range(0, picture.q_len + 1, picture.block[0]), 0, picture.k_len, colors="0.55", linewidth=0.6
        )
        axes.vlines(
            range(0, picture.k_len + 1, picture.block[1]), 0, picture.q_len, colors="0.55", linewidth=0.6
        )
    axes.set(xlabel="key", ylabel="query", title=title)
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    counts = picture.counts()
    figure.legend(
        handles=[
            Patch(facecolor=_FORBIDDEN[EMPTY], edgecolor="0.55", label=f"{counts['empty']} empty, skipped"),
            Patch(facecolor=_ALLOWED[PARTIAL], label=f"{counts['partial']} partial, masked"),
            Patch(facecolor=_ALLOWED[FULL], label=f"{counts['full']} full, no mask needed"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, dpi=150)
