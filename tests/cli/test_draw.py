"""`anyflash draw` draws the mask that its options spell, with the classes that kernels use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from anyflash.cli import _options, draw, main
from anyflash.cli._drawing import NAMES

Q, K = np.arange(12)[:, None], np.arange(12)
IDS = np.repeat([0, 1, 2], [3, 5, 4])


def _draw(*options: str) -> Result:
    return CliRunner().invoke(main.app(), ["draw", *options], env={"COLUMNS": "100"})


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        pytest.param((), np.ones((12, 12), bool), id="nothing"),
        pytest.param(("--causal",), K <= Q, id="causal"),
        pytest.param(("--window", "3,1"), (Q - 3 <= K) & (K <= Q + 1), id="window"),
        pytest.param(("--window", ",0"), K <= Q, id="window without a left bound"),
        pytest.param(("--prefix", "4", "--causal"), (K <= Q) | (K < 4), id="prefix and causal"),
        pytest.param(("--prefix", "4"), np.broadcast_to(K < 4, (12, 12)), id="prefix"),
        pytest.param(("--documents", "3,5,4"), IDS[:, None] == IDS, id="documents"),
        pytest.param(
            ("--documents", "3,5,4", "--window", "2,0"),
            (IDS[:, None] == IDS) & (K <= Q) & (Q - 2 <= K),
            id="both",
        ),
    ],
)
def test_drawing_shows_the_mask(options: tuple[str, ...], allowed: np.ndarray) -> None:
    lines = _draw("--q", "12", "--k", "12", "--block", "4", *options).output.splitlines()[:-1]
    upper = {" ": False, "▄": False, "▀": True, "█": True}
    lower = {" ": False, "▄": True, "▀": False, "█": True}
    shown = [[rule[c] for c in line.ljust(12)] for line in lines for rule in (upper, lower)]
    assert np.array_equal(np.array(shown), allowed)


def test_tiles_agree_with_the_cells() -> None:
    found = json.loads(_draw("--q", "12", "--k", "12", "--block", "4,3", "--causal", "--json").output)
    tiles = (K <= Q).reshape(3, 4, 4, 3).swapaxes(1, 2).reshape(12, 12)
    classes = np.where(tiles.all(1), 2, np.where(tiles.any(1), 1, 0))
    assert found["tiles"] == {name: int((classes == code).sum()) for code, name in enumerate(NAMES)}


def test_fewer_queries_than_keys_are_the_last_ones() -> None:
    assert _draw("--q", "2", "--k", "6", "--causal").output.splitlines()[0] == "█████▄"


def test_large_masks_are_drawn_without_their_cells() -> None:
    mask = draw.mask_of(True, None, None, [], 5000)
    picture = draw.picture_of(mask, 5000, 5000, (100, 100))
    assert picture.cells is None
    assert picture.counts() == {"empty": 1225, "partial": 50, "full": 1225}


def test_image_is_written(tmp_path: Path) -> None:
    path = tmp_path / "mask.svg"
    assert _draw("--q", "64", "--causal", "--out", str(path)).exit_code == 0
    assert "causal()" in path.read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--window", "3"), "LEFT,RIGHT"),
        (("--window", "a,b"), "whole number"),
        (("--block", "0"), "at least 1"),
        (("--documents", "3,3"), "add up to 6; expected 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_explained(options: tuple[str, ...], said: str) -> None:
    done = _draw(*options)
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", "").split())


@pytest.mark.parametrize(
    ("text", "window"),
    [("16,0", (16, 0)), (",0", (None, 0)), ("4,", (4, None)), (",", (None, None)), (None, None)],
)
def test_window_option(text: str | None, window: object) -> None:
    assert _options.window(text) == window
