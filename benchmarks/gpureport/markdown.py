"""What was found, as a page."""

from __future__ import annotations

from typing import Any

Found = dict[str, Any]
NAMES = ("triton", "hopper", "hopper, any order", "cudnn", "flash", "flex", "math")
# What the kernels for Hopper are to reach on an H200, TFLOP/s: by direction and cell.
GOALS = {
    "forward": {
        "128 2048 full": 640, "128 8192 full": 695, "128 16384 full": 705, "128 2048 causal": 490,
        "128 8192 causal": 650, "128 16384 causal": 680, "64 16384 full": 500, "256 16384 full": 740,
    },
    "backward": {
        "128 2048 full": 510, "128 8192 full": 600, "128 16384 full": 615, "128 2048 causal": 375,
        "128 8192 causal": 545, "128 16384 causal": 585,
    },
}  # fmt: skip


def markdown(found: Found) -> str:
    lines = ["# Attention on a GPU: anyflash's kernels and their peers", ""]
    lines += ["Written by `benchmarks/gpu_report.py`; not edited.", ""]
    if found["machine"].get("dry"):
        lines += ["**A dry run on a CPU, by Triton's interpreter: times mean nothing.**", ""]
    lines += [f"- {key}: {value}" for key, value in found["machine"].items()]
    lines += [f"- {key}: {value:.0f}" for key, value in found.get("ceilings", {}).items()]
    for part, cases in found.items():
        judged = _judged(cases)
        if judged:
            wrong = [name for name, case in judged.items() if not case["right"]]
            lines += ["", f"## {part}: {len(judged) - len(wrong)} of {len(judged)} right", ""]
            lines += [f"- wrong: {name}: {judged[name]}" for name in wrong]
    for part in [name for name in found if name.startswith("contract")]:
        lines += ["", f"## {part}", "", *[f"- {name}: {said}" for name, said in found[part].items()]]
    lines += _grid(found.get("grid", {})) + _goals(found.get("grid", {}))
    lines += _decode(found.get("decode", {})) + _sweep(found.get("sweep", {}))
    for part in ("checkers", "ptxas"):
        if found.get(part):
            lines += ["", f"## {part}", ""]
            lines += [f"- {name}: {_short(said)}" for name, said in found[part].items()]
    for part, error in found.get("errors", {}).items():
        lines += ["", f"## {part} failed", "", "```", error, "```"]
    return "\n".join(lines) + "\n"


def _judged(cases: Any) -> Found:
    if not isinstance(cases, dict):
        return {}
    return {name: case for name, case in cases.items() if isinstance(case, dict) and "right" in case}


def _short(said: Any) -> str:
    if isinstance(said, dict) and "status" in said:
        return f"status {said['status']} {said.get('said', '')}".replace("\n", " ")[:300]
    return str(said)[:600]


def _grid(cells: Found) -> list[str]:
    lines = []
    present = [n for n in NAMES if any(n in c.get("TFLOP/s", {}).get("forward", {}) for c in _dicts(cells))]
    for which in ("forward", "backward") if present else ():
        lines += ["", f"## {which}, bfloat16, TFLOP/s", ""]
        lines += ["| head_dim, length | " + " | ".join(present) + " |", "|---|" + "---:|" * len(present)]
        for cell, record in cells.items():
            speed = record.get("TFLOP/s", {}).get(which, {}) if isinstance(record, dict) else {}
            lines.append(
                f"| {cell} | " + " | ".join(f"{speed[n]:.0f}" if n in speed else "-" for n in present) + " |"
            )
    failed = {f"{n}: {why}" for c in _dicts(cells) for n, why in c.get("failed", {}).items()}
    return lines + ([""] + [f"- {line}" for line in sorted(failed)[:20]] if failed else [])


def _goals(cells: Found) -> list[str]:
    lines = []
    for which, goals in GOALS.items():
        for cell, goal in goals.items():
            record = cells.get(cell)
            speed = record.get("TFLOP/s", {}).get(which, {}) if isinstance(record, dict) else {}
            ours = max(
                (speed[name] for name in NAMES if name.startswith("hopper") and name in speed), default=0
            )
            if ours:
                peer = f"{ours / speed['cudnn']:.2f}" if "cudnn" in speed else "-"
                said = "reached" if ours >= goal else f"{ours / goal:.0%}"
                lines.append(f"| {which} {cell} | {ours:.0f} | {goal} | {said} | {peer} |")
    head = [
        "",
        "## What is to be reached",
        "",
        "| | hopper | to reach | | of cuDNN |",
        "|---|---:|---:|---|---:|",
    ]
    return head + lines if lines else []


def _decode(cells: Found) -> list[str]:
    if not cells:
        return []
    lines = ["", "## One query over a cache", "", "| | ms | GB/s | of a copy's |", "|---|---:|---:|---:|"]
    for name, record in cells.items():
        if isinstance(record, dict) and "GB/s" in record:
            share = f"{record['of copy']:.0%}" if record.get("of copy") else "-"
            lines.append(f"| {name} | {record['milliseconds']:.3f} | {record['GB/s']:.0f} | {share} |")
    return lines


def _sweep(variants: Found) -> list[str]:
    if not variants:
        return []
    lines = ["", "## Hopper's schedule, 128 8192 causal", "", "| | TFLOP/s |", "|---|---:|"]
    for name, record in variants.items():
        speed = record.get("TFLOP/s") if isinstance(record, dict) else None
        lines.append(f"| {name} | {f'{speed:.0f}' if speed else _short(record)} |")
    return lines


def _dicts(cells: Found) -> list[Found]:
    return [cell for cell in cells.values() if isinstance(cell, dict)]
