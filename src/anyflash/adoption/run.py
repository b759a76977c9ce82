"""Runs rows one after another, each in a process of its own, and says how far it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from anyflash.adoption.row import Row

Progress = Callable[[Row, str, float], None]
_LAST_LINES = 12


def run(
    rows: Sequence[Row],
    quick: bool,
    progress: Progress,
    keep: Callable[[list[dict[str, Any]]], object] = lambda found: None,
) -> list[dict[str, Any]]:
    """A record a row: `status` is "ok", "absent" (with `how_to_install`) or "failed" (with `why`).

    `keep` takes the records so far after each row, so that a run that is stopped leaves what it has found.
    """
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(_run_row(row, quick, progress))
        keep(found)
    return found


def _run_row(row: Row, quick: bool, progress: Progress) -> dict[str, Any]:
    head: dict[str, Any] = {
        "name": row.name,
        "system": row.system,
        "title": row.title,
        "versions": {r.package: r.installed() for r in row.requires},
    }
    absent = row.absent()
    if absent:
        progress(row, "absent", 1.0)
        how = [r.how_to_install for r in absent]
        return head | {"status": "absent", "missing": [r.package for r in absent], "how_to_install": how}
    outcome = _in_a_process(row, quick, progress)
    progress(row, "failed" if outcome["status"] == "failed" else "done", 1.0)
    return head | outcome


def _in_a_process(row: Row, quick: bool, progress: Progress) -> dict[str, Any]:
    command = [sys.executable, "-m", "anyflash.adoption.worker", row.module, row.name]
    command += ["--quick"] if quick else []
    # Models and tokenizers come from installed packages: nothing may be looked up on the way.
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    outcome: dict[str, Any] | None = None
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as worker,
    ):
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                message = json.loads(line)
                if "doing" in message:
                    progress(row, message["doing"], message["part"])
                elif "record" in message:
                    outcome = message["record"] | {"status": "ok"}
                else:
                    outcome = {"status": "failed", "why": message["error"]}
            code = worker.wait()
        except BaseException:
            worker.kill()
            raise
        said.seek(0)
        last = said.read().splitlines()[-_LAST_LINES:]
    if outcome is None:
        outcome = {"status": "failed", "why": f"its process ended with code {code} before it had a result"}
    return outcome if outcome["status"] == "ok" else outcome | {"log": last}
