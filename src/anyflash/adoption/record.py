"""The whole of what a run found, and its two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anyflash.adoption import memory, page
from anyflash.adoption.agreement import FACTORS
from anyflash.core.errors import InvalidCall

FORMAT = 1
# What every row runs on.
_SHARED = ("python", "anyflash", "numpy", "torch")
_HOW = """
Each row runs in a process of its own: the real package, the same model object, weights and input for every
attention. Only the attention is exchanged. 'Best own' is the fastest attention that the system itself brings
for this workload on this machine.

First, agreement. Outputs and gradients of every attention are compared with the same step in float64 under an
attention of the system's own. Ours may err at most {outputs:g} times as much as the worse of the system's own
({gradients:g} times for gradients), plus one rounding of the dtype; otherwise the row fails and is not timed.
The error is the root mean square of the difference, relative to that of the float64 values. The greatest
difference is the largest absolute one between ours and eager.

Then time. The attentions take turns, one step each a round, the order turning by one from round to round; the
figure is the median. All have run once before, so compilation and other first-time work is not in it.

Then memory: {memory}. Weights and inputs are there already and are not counted; activations, gradients and
all working memory are. Freed memory is given back to the system before the step.
"""


def report(rows: list[dict[str, Any]], quick: bool, where: dict[str, Any]) -> dict[str, Any]:
    """Everything that adoption.json holds; `where` is the machine. `format` changes when a reader would have
    to."""
    return {
        "format": FORMAT,
        "quick": quick,
        "machine": where,
        "how": _how(),
        "rows": rows,
    }


def read(file: Path) -> dict[str, Any]:
    """An earlier run's adoption.json. Raises InvalidCall for anything else."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        raise InvalidCall("from", f"{file}, format {found.get('format')!r}", f"format {FORMAT}")
    return found


def merged(earlier: dict[str, Any], later: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """`earlier` with the rows of `later` in it, which was taken up at another time on the same machine.

    Systems may be of other versions, as they are in environments for those that clash; rows tell theirs.
    Raises InvalidCall if the machine differs, what all rows share, or the size of the workloads.
    """
    first, second = earlier["machine"], later["machine"]
    differ = [key for key in ("cpu", "cores") if first[key] != second[key]]
    differ += [name for name in _SHARED if first["versions"].get(name) != second["versions"].get(name)]
    differ += ["quick"] if earlier["quick"] != later["quick"] else []
    if differ:
        raise InvalidCall("resume", f"a run with other {', '.join(differ)}", "one like this")
    rows = {r["name"]: r for r in (*earlier["rows"], *later["rows"])}
    taken_up = [*earlier.get("taken_up", []), later["machine"]["date"]]
    return earlier | {"rows": [rows[name] for name in order if name in rows], "taken_up": taken_up}


def _how() -> list[str]:
    """Paragraphs of plain text."""
    text = _HOW.format(outputs=FACTORS["outputs"], gradients=FACTORS["gradients"], memory=memory.method())
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def write(found: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """adoption.json and adoption.html in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    data, html = folder / "adoption.json", folder / "adoption.html"
    data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    html.write_text(page.render(found), encoding="utf-8")
    return data, html
