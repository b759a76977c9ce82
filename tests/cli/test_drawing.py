"""Pictures of masks: what the terminal shows is what the cells and the tile classes say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from anyflash.cli._drawing import Picture, save, terminal
from anyflash.semantics.tiles import EMPTY, FULL, PARTIAL


def _picture(cells: np.ndarray, block: tuple[int, int], keep: bool = True) -> Picture:
    """Classes counted from the cells, as an oracle."""
    tiles = [
        [cells[i : i + block[0], j : j + block[1]] for j in range(0, cells.shape[1], block[1])]
        for i in range(0, cells.shape[0], block[0])
    ]
    classes = np.array(
        [[FULL if t.all() else PARTIAL if t.any() else EMPTY for t in row] for row in tiles], np.int8
    ).reshape(-(-cells.shape[0] // block[0]), -(-cells.shape[1] // block[1]))
    return Picture(*cells.shape, block, classes, cells if keep else None)


CAUSAL = np.tril(np.ones((4, 4), bool))
LOWER = np.tril(np.ones((512, 512), bool))


@pytest.mark.parametrize(
    ("picture", "width", "lines"),
    [
        pytest.param(_picture(CAUSAL, (2, 2)), 80, ["█▄", "███▄"], id="cells"),
        pytest.param(_picture(CAUSAL[:3], (2, 2)), 80, ["█▄", "▀▀▀"], id="odd rows"),
        pytest.param(_picture(CAUSAL, (2, 2), keep=False), 80, ["▒", "█▒"], id="tiles"),
        pytest.param(_picture(LOWER, (128, 128)), 80, ["▒", "█▒", "██▒", "███▒"], id="cells too wide"),
        pytest.param(_picture(LOWER, (64, 64)), 4, ["▒▒", "██▒▒"], id="tiles too wide: 2 x 4 a character"),
        pytest.param(_picture(np.zeros((0, 4), bool), (2, 2)), 80, [], id="no queries"),
        pytest.param(_picture(np.zeros((4, 0), bool), (2, 2)), 80, [], id="no keys"),
    ],
)
def test_terminal(picture: Picture, width: int, lines: list[str]) -> None:
    shown = terminal(picture, width).plain.splitlines()
    assert [line.rstrip() for line in shown if line.strip()] == lines


def test_tile_classes_colour_the_cells() -> None:
    text = terminal(_picture(CAUSAL, (2, 2)), 80)
    style = [str(text.get_style_at_offset(Console(), offset)) for offset in range(len(text.plain))]
    first, second = text.plain.index("\n") + 1, text.plain.index("\n") + 3
    assert style[0] == style[second] != style[first], "diagonal tiles are partial, the one below them is full"


def test_summary_counts_what_is_computed() -> None:
    picture = _picture(LOWER, (128, 128))
    assert picture.counts() == {"empty": 6, "partial": 4, "full": 6}
    assert "10 of 16 tiles are computed (62%)" in picture.summary()


@pytest.mark.parametrize("keep", [True, False], ids=["cells", "tiles"])
def test_image(keep: bool, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "mask.png"
    save(_picture(LOWER, (128, 128), keep), path, "causal")
    image = imread(path)
    assert image.shape[0] > 500
    assert image.shape[1] > 500
    full, half = (
        image[int(y * image.shape[0]), int(x * image.shape[1])] for x, y in ((0.2, 0.75), (0.9, 0.2))
    )
    assert not np.allclose(full, half), "the full and the empty corner look alike"
