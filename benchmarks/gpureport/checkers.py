"""Memory checkers where they are present, and the versions of ptxas that are here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpureport.place import Clock, Place

Keep = Callable[[str, Any], None]
SCRIPT = Path(__file__).resolve().parents[1] / "gpu_report.py"
LIMIT = 100.0


def compilers() -> dict[str, str]:
    """Every ptxas here, by path, and its version."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = [*sorted(folder.glob("ptxas*")), *sorted(Path("/usr/local").glob("cuda*/bin/ptxas"))]
    chosen = os.environ.get("TRITON_PTXAS_PATH") or shutil.which("ptxas")
    paths = dict.fromkeys([str(p) for p in found] + ([chosen] if chosen else []))
    return {path: _version(path) for path in paths}


def _version(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if "release" in line]
    return lines[0].split("release")[1].strip() if lines else f"exit {done.returncode}"


def sanitizer() -> str | None:
    places = [shutil.which("compute-sanitizer")]
    places += [str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    return next((p for p in places if p), None)


def checkers(place: Place, clock: Clock, part: str, keep: Keep, backends: tuple[str, ...]) -> None:
    """Small calls of each backend in a process of its own, under each checker."""
    tool = sanitizer()
    runs: dict[str, tuple[list[str], dict[str, str]]] = {"none, for comparison": ([], {})}
    if tool:
        for kind in ("memcheck", "racecheck", "initcheck"):
            runs[f"compute-sanitizer {kind}"] = ([tool, "--tool", kind, "--error-exitcode", "99"], {})
    else:
        keep("compute-sanitizer", "not on this machine")
    if not place.dry:
        runs["consan, of Triton"] = ([], {"TRITON_INSTRUMENTATION_MODE": "consan"})
    for backend in backends:
        for name, (before, extra) in clock.while_time(part, runs.items(), []):
            limit = min(LIMIT, max(20.0, clock.left(part)))
            keep(f"{backend}: {name}", child(["--tiny", backend], place, limit, before, extra))


def other_compilers(place: Place, clock: Clock, part: str, keep: Keep, backends: tuple[str, ...]) -> None:
    """One cell of the grid again, compiled by each ptxas."""
    known = compilers()
    keep("versions", known)
    for path in clock.while_time(part, [] if place.dry else list(known), []):
        for backend in backends:
            extra = {"TRITON_PTXAS_PATH": path, "TRITON_PTXAS_BLACKWELL_PATH": path}
            found = child(["--one", backend], place, min(LIMIT, max(20.0, clock.left(part))), [], extra)
            keep(f"{backend}: {known[path]}", found)


def child(
    arguments: list[str], place: Place, limit: float, before: list[str], extra: dict[str, str]
) -> dict[str, Any]:
    """This script with `arguments` in a process of its own: its status and the end of what it says."""
    command = [*before, sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    if place.dry:
        command.append("--dry")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit, env=os.environ | extra
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not done in {limit:.0f} s"}
    record: dict[str, Any] = {"status": done.returncode, "said": done.stdout.strip()[-600:]}
    if done.returncode:
        record["errors"] = (done.stdout + done.stderr)[-2500:]
    return record
