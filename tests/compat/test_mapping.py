"""Each row of `anyflash.compat.mapping.DIFFERENCES`, exactly.

Masks are read off exactly: with q = k = 0 every key that a query sees has the same share, so out times their
number is a whole number for one-hot v.
"""

from __future__ import annotations

import importlib

import pytest

from anyflash.compat import mapping
from architecture.sources import ROOT
from compat.rows import TESTS

for _part in ("compat.rows_first", "compat.rows_later"):
    pytest.register_assert_rewrite(_part)
    importlib.import_module(_part)  # fills TESTS


def test_every_difference_has_a_test() -> None:
    names = [difference.name for difference in mapping.DIFFERENCES]
    assert len(set(names)) == len(names)
    assert set(TESTS) == set(names)


def test_the_documentation_shows_them() -> None:
    rows = [
        f"| {d.name} | {', '.join(map(str, d.where))} | {d.theirs} | {d.ours} |" for d in mapping.DIFFERENCES
    ]
    page = (ROOT / "docs" / "flash_attn.md").read_text("utf-8")
    assert [line for line in page.splitlines() if line in rows] == rows


@pytest.mark.parametrize("name", [difference.name for difference in mapping.DIFFERENCES])
def test_difference(name: str) -> None:
    TESTS[name]()
