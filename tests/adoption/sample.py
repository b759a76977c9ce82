"""A report as a run makes it, with figures that are easy to recognise."""

from __future__ import annotations

from typing import Any

from anyflash.adoption import machine, record


def row(name: str, seconds: tuple[float, float, float], mib: tuple[int, int, int]) -> dict[str, Any]:
    roles = ("eager", "best", "ours")
    variants = [
        {"role": role, "label": label, "seconds": [0.97 * s, s, 1.05 * s], "median": s, "peak_bytes": m << 20}
        for role, label, s, m in zip(roles, ("eager", "sdpa", "anyflash"), seconds, mib, strict=True)
    ]
    errors = {"eager": 2e-7, "best": 3e-7, "ours": 2.5e-7}
    agreement = [
        {"kind": kind, "errors": errors, "allowed": 7e-7, "difference": 1.5e-6, "of": 3.0}
        for kind in ("outputs", "gradients")
    ]
    return {
        "name": name,
        "system": "PyTorch" if name.startswith("torch") else "A <system>",
        "title": f"{name}, a training step",
        "versions": {"torch": "2.13.0"},
        "status": "ok",
        "workload": "a model of some layers & heads, its input, and what one step is, said in a sentence",
        "dtype": "float32",
        "agreement": agreement,
        "variants": variants,
        "speedup": {role: seconds[i] / seconds[2] for i, role in enumerate(roles[:2])},
        "memory_method": "resident memory",
    }


REACH = {
    "unit": "residues",
    "limit": 512 << 20,
    "longest": {"eager": 224, "best": 480, "ours": 2048},
    "open": ["ours"],
    "peaks": {"eager": {"224": 500 << 20, "256": 700 << 20}},
}
CURVE = {
    "losses": {"eager": [5.5, 4.25, 3.75], "best": [5.5, 4.25, 3.75], "ours": [5.5, 4.25, 3.76]},
    "difference": 0.01,
    "gained": 1.75,
}


def rows() -> list[dict[str, Any]]:
    head = {"system": "Another system", "title": "a workload", "versions": {}}
    return [
        row("torch-encoder-float32", (0.398, 0.312, 0.251), (297, 90, 71)),
        row("torch-encoder-bfloat16", (0.578, 0.336, 0.372), (227, 56, 49)),
        row("packed", (3.28, 1.6, 0.5), (529, 236, 120)) | {"curve": CURVE, "reach": REACH},
        head
        | {
            "name": "absent",
            "status": "absent",
            "missing": ["it"],
            "how_to_install": ["pip install 'it>=1,<2'"],
        },
        head
        | {
            "name": "failed",
            "status": "failed",
            "why": "RuntimeError: our <outputs> err",
            "log": ["line <1>", "2"],
        },
    ]


def report(quick: bool = False) -> dict[str, Any]:
    return record.report(rows(), quick, machine.describe())
