"""What the GPU kernels do on a real GPU, in under ten minutes: right, then how fast.

    python benchmarks/gpu_report.py OUT [--quick] [--seconds 570] [--dry] [--parts grid,decode]

Writes OUT/gpu.json and OUT/gpu.md after every cell, so that a run that is stopped leaves what it has found.
Each part has a share of the time and says what it had none for; a part that fails is told with its traceback
and the others go on. Parts, in `gpureport`: the machine and its ceilings (matrix product, copy); kernels
compiled on all cores; every kernel against float64, in memory that holds NaN, and repeated for the same bits;
caches and graphs; the grid at 16384 tokens beside torch's cuDNN and flash attention and FlexAttention; cases
of the contract; variants of Hopper's schedule; memory checkers; other versions of ptxas.

Runs with Python 3.12, torch 2.11 and Triton 3.6 as they are; anyflash is imported from `src` beside this
folder if it is not installed. `--dry` runs every part on the CPU by Triton's interpreter, on tiny shapes: so
that no slip of the pen meets a GPU first.

Times are medians of repeats on the device, by CUDA events, after the L2 cache was overwritten; ours and the
peers take turns. TFLOP/s count 4 S^2 D H B forward, 2.5 times that backward, half if causal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--dry" in sys.argv:
    # Kernels are interpreted if this is set before they are imported.
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))
try:
    import anyflash  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

from anyflash.backends.registry import entries
from gpureport import checkers, correctness, decode, eight, grid, warm
from gpureport.markdown import Found, markdown
from gpureport.place import Clock, Place

# Of the time, by part, in the order in which they run.
SHARES = {
    "ceilings": 10.0,
    "warm": 90.0,
    "triton": 70.0,
    "hopper": 50.0,
    "caches": 25.0,
    "graphs": 10.0,
    "eight bits": 10.0,
    "grid": 130.0,
    "decode": 40.0,
    "sweep": 30.0,
    "contract": 45.0,
    "checkers": 40.0,
    "ptxas": 20.0,
}


def machine(place: Place) -> Found:
    import triton

    found: Found = {"dry": True, "processor": platform.processor()} if place.dry else {}
    if not place.dry:
        properties = torch.cuda.get_device_properties(0)
        found = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found | {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": ", ".join(checkers.compilers().values()),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def ceilings(place: Place) -> Found:
    side, size = (256, 1 << 20) if place.dry else (8192, 1 << 30)
    a, b = (torch.randn(side, side, device=place.device).to(torch.bfloat16) for _ in range(2))
    x = torch.empty(size, dtype=torch.int8, device=place.device)
    y = torch.empty_like(x)
    found = place.milliseconds({"product": lambda: a @ b, "copy": lambda: y.copy_(x)}, 2.0)
    return {
        "bfloat16 product, TFLOP/s": 2 * side**3 / found["product"] / 1e9,
        "copy, GB/s": 2 * x.numel() / found["copy"] / 1e6,
    }


def architecture(place: Place) -> str:
    from anyflash.kernels.triton.device import present

    return "sm_90" if place.dry else present()


def compiled(place: Place, clock: Clock, backends: tuple[str, ...]) -> Found:
    """Kernels of the calls to come, the grid's first."""
    wanted = [(case, True) for case in (*grid.cells(place),)]
    wanted += [(case, True) for backend in backends for case in correctness.cases(place, backend)]
    return warm.warm(wanted[:1] if place.dry else wanted, architecture(place), clock.left("warm"))


def present() -> tuple[str, ...]:
    """Our backends of GPUs that work here."""
    return tuple(n for n in ("triton", "hopper") if n in entries() and entries()[n].reason is None)


def tiny(place: Place, backend: str) -> int:
    """Small calls, each once, for a memory checker."""
    for case in correctness.cases(Place(dry=True, quick=True), backend):
        made = correctness.make(case, place.device)
        if why := made.call.declined():
            sys.stdout.write(f"{case}: {why}\n")
            continue
        results = made.call.forward(made.call.results())
        made.call.backward(results, made.dout)
    place.wait()
    sys.stdout.write("ran\n")
    return 0


def one(place: Place, backend: str) -> int:
    """One cell of the grid, and causal cases against float64, as JSON; by whatever ptxas is set."""
    from anyflash.kernels.gluon import assembler

    assembler.doubtful = lambda: None
    quick = Place(place.dry, quick=True)
    judged = {str(c): correctness.check(c, quick) for c in correctness.cases(quick, backend) if c.causal}
    case = grid.cells(place)[0]
    found = {
        "TFLOP/s": grid.cell(case, place, (backend,), 0.5).get("TFLOP/s"),
        "wrong": {name: said for name, said in judged.items() if not said.get("right")},
        "causal cases": len(judged),
    }
    sys.stdout.write(json.dumps(found))
    return 0


def parts(place: Place, clock: Clock, found: Found, keep: Callable[[str, str, Any], None]) -> Found:
    """By name, what runs each; all but the first put their cells into the report as they go."""
    ours = present()
    into = lambda part: lambda name, record: keep(part, name, record)
    copy = lambda: found.get("ceilings", {}).get("copy, GB/s")
    each: Found = {
        "ceilings": lambda: ceilings(place),
        "warm": lambda: compiled(place, clock, ours),
        "triton": lambda: correctness.correctness(place, clock, "triton", into("triton"), "triton"),
        "hopper": lambda: correctness.correctness(place, clock, "hopper", into("hopper"), "hopper"),
        "caches": lambda: decode.correctness(place, clock, "caches", into("caches"), ours),
        "graphs": lambda: decode.graphs(place, into("graphs"), ours),
        "eight bits": lambda: eight.eight(place, into("eight bits"), ours),
        "grid": lambda: grid.grid(place, clock, "grid", into("grid"), ours),
        "decode": lambda: decode.speed(place, clock, "decode", into("decode"), ours, copy()),
        "sweep": lambda: grid.sweep(place, clock, "sweep", into("sweep")),
        "contract": lambda: correctness.contract(place, clock, "contract", into("contract"), ours),
        "checkers": lambda: checkers.checkers(place, clock, "checkers", into("checkers"), ours),
        "ptxas": lambda: checkers.other_compilers(place, clock, "ptxas", into("ptxas"), ours),
    }
    assert each.keys() == SHARES.keys()
    if "hopper" not in ours:
        for part in ("hopper", "sweep"):
            del each[part]
            keep(part, "not here", entries()["hopper"].reason if "hopper" in entries() else "no such backend")
    return each


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path("gpu-report"))
    parser.add_argument("--quick", action="store_true", help="a few cells only")
    parser.add_argument("--dry", action="store_true", help="on the CPU, by Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=570.0, help="in all")
    parser.add_argument("--parts", default=",".join(SHARES), help="which, with commas between")
    parser.add_argument("--tiny", metavar="BACKEND", help="run small calls once, and no more")
    parser.add_argument("--one", metavar="BACKEND", help="time one cell, and no more")
    given = parser.parse_args()
    place = Place(given.dry, given.quick)
    if given.tiny:
        return tiny(place, given.tiny)
    if given.one:
        return one(place, given.one)
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = given.parts.split(",")
    clock = Clock(given.seconds, {name: share for name, share in SHARES.items() if name in chosen})
    found: Found = {"machine": machine(place), "errors": {}, "seconds": {}}

    def save() -> None:
        (given.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.out / "gpu.md").write_text(markdown(found))

    def keep(part: str, name: str, record: Any) -> None:
        found.setdefault(part, {})[name] = record
        save()

    for name, part in parts(place, clock, found, keep).items():
        if name not in chosen:
            continue
        start = time.perf_counter()
        try:
            made = part()
            if made is not None:
                found[name] = made
        except Exception:  # noqa: BLE001 - the other parts are worth having without this one
            found["errors"][name] = traceback.format_exc()
        found["seconds"][name] = round(time.perf_counter() - start, 1)
        save()
    sys.stdout.write((given.out / "gpu.md").read_text())
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
