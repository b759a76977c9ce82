"""What the GPU kernels do on a real GPU, in under ten minutes: right, then how fast.

    python benchmarks/gpu_report.py OUT [--quick]

Writes OUT/gpu.json after every part, so that a run that is stopped leaves what it has found, and OUT/gpu.md
at the end, for docs/results/. Parts: the machine and its ceilings (matrix product, copy); every kernel
against float64, in memory that holds NaN, and three times more for the same bits; the grid at 16384 tokens
beside torch's cuDNN and flash attention and FlexAttention. Runs with Python 3.12, torch 2.11 and Triton 3.6
as they are; anyflash is imported from `src` beside this folder if it is not installed.

Times are medians of repeats on the device, by CUDA events, after the L2 cache was overwritten; ours and the
peers take turns. TFLOP/s count 4 S^2 D H B forward, 2.5 times that backward, half if causal.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import anyflash  # noqa: F401
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflash.core.device import Device
from anyflash.dispatch.plan import Plan, execute_backward, execute_forward, plan
from anyflash.frontends.torch_arrays import view
from anyflash.semantics.describe import describe, describe_program
from anyflash.semantics.operands import Gradients, Results, Saved

Found = dict[str, Any]
TOKENS, WIDTH = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DIMS = (64, 128, 256)


class Call:
    """One call of ours, prepared: arrays (batch, heads, rows, dim) of any dtype."""

    def __init__(self, q: Any, k: Any, v: Any, tables_with_gradient: bool = False, **keywords: Any) -> None:
        self.arrays = q, k, v
        made = describe_program(
            _shape(q), _shape(k), lambda _, t: str(t.dtype).removeprefix("torch."), layout="bhsd",
            sequences=None, **keywords,
        )  # fmt: skip
        self.tables = list(made.tables)
        seed = keywords.get("seed") or 0
        problem, operands = describe(
            made.program, view(q), view(k), view(v), layout="bhsd",
            tables=tuple(view(t) for t in made.tables), names=made.names,
            needs_grad=tuple(tables_with_gradient and t.is_floating_point() for t in made.tables), seed=seed,
        )  # fmt: skip
        self.problem, self.operands = problem, operands
        self.plan: Plan = plan(problem, Device("cuda", 0), "triton")

    def results(self, fill: float = float("nan")) -> tuple[Any, Any, Any]:
        q, _, v = self.arrays
        batch, heads, rows = q.shape[:3]
        out = torch.full((batch, heads, rows, v.shape[3]), fill, dtype=q.dtype, device=q.device)
        lse = torch.full((batch, heads, rows), fill, dtype=torch.float32, device=q.device)
        return out, lse, torch.full((2, *lse.shape), fill, dtype=torch.float32, device=q.device)

    def forward(self, made: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        out, lse, stats = made
        execute_forward(self.plan, self.operands, Results(_rows(out), view(lse), view(stats)))
        return made

    def backward(self, made: tuple[Any, Any, Any], dout: Any, fill: float | None = None) -> list[Any]:
        out, _, stats = made
        grads = [torch.empty_like(t) for t in self.arrays]
        tables = [
            torch.empty(t.shape, dtype=torch.float32, device=t.device) if spec.needs_grad else None
            for t, spec in zip(self.tables, self.problem.tables, strict=True)
        ]
        for t in (*grads, *(t for t in tables if t is not None)):
            if fill is not None:
                t.fill_(fill)
        execute_backward(
            self.plan,
            self.operands,
            Saved(_rows(out), view(stats), _rows(dout)),
            Gradients(*map(_rows, grads), tuple(None if t is None else view(t) for t in tables)),
        )
        return [*grads, *(t for t in tables if t is not None)]


def _shape(t: Any) -> tuple[int, ...]:
    batch, heads, rows, dim = t.shape
    return batch, rows, heads, dim


def _rows(t: Any) -> Any:
    return view(t).permute((0, 2, 1, 3))


def machine() -> Found:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


_flush: list[Any] = []


def milliseconds(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Medians; the calls take turns until the time is up, at least five times each."""
    if not _flush:
        _flush.append(torch.empty(256 << 20, dtype=torch.int8, device="cuda"))
    for call in calls.values():
        call()
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    torch.cuda.synchronize()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 5:
        for name, call in calls.items():
            _flush[0].zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            taken[name].append(start.elapsed_time(stop))
    return {name: statistics.median(values) for name, values in taken.items()}


def ceilings() -> Found:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    found = milliseconds({"product": lambda: a @ b, "copy": lambda: y.copy_(x)}, 2.0)
    return {
        "bfloat16 product, TFLOP/s": 2 * 8192**3 / found["product"] / 1e9,
        "copy, GB/s": 2 * x.numel() / found["copy"] / 1e6,
    }


def _plain(q: Any, k: Any, v: Any, dtype: Any, score: Any, mask: Any) -> Any:
    """Attention as it is defined, in `dtype`, with gradients."""
    q, k, v = (t.to(dtype) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    s = score(s) if score else s
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    return s.softmax(-1).to(dtype) @ v


def correctness(quick: bool) -> Found:
    """Root mean square errors from float64 over those of plain attention in the same dtype: at most 2 forward
    and 3 backward."""
    import anyflash as af

    found: Found = {}
    torch.manual_seed(0)
    cases: list[tuple[Any, ...]] = [
        (dtype, dim, lens, causal)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for dim in (64, 128) + (() if quick else (40, 80, 96, 192, 256))
        for lens in ((128, 128), (257, 385))
        for causal in (False, True)
    ]
    for dtype, dim, (rows, keys), causal in cases:
        for extra in ("plain", "softcap, ALiBi", "bias") if dim == 64 else ("plain",):
            q, k, v = (
                torch.randn(2, heads, n, dim, device="cuda").to(dtype)
                for heads, n in ((4, rows), (2, keys), (2, keys))
            )
            dout = torch.randn(2, 4, rows, dim, device="cuda").to(dtype)
            distance = (torch.arange(rows, device="cuda")[:, None] + keys - rows) - torch.arange(
                keys, device="cuda"
            )
            mask = distance >= 0 if causal else None
            keywords: Found = {"causal": causal}
            score = None
            if extra.startswith("softcap"):
                slopes = torch.rand(4, device="cuda")
                keywords |= {"softcap": 5.0, "alibi_slopes": slopes}
                score = lambda s, c=slopes, d=distance: 5 * torch.tanh(s / 5) - c[:, None, None] * d.abs()
            elif extra == "bias":
                bias = torch.randn(1, 4, rows, keys, device="cuda")
                keywords["bias"] = bias
                score = lambda s, c=bias: s + c
            call = Call(q, k, v, tables_with_gradient=True, **keywords)
            made = call.forward(call.results())
            grads = call.backward(made, dout, float("nan"))
            errors = {}
            leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
            exact = _plain(*leaves, torch.float64, score, mask)
            wanted = [exact, *torch.autograd.grad(exact, leaves, dout.double())]
            near = [t.detach().clone().requires_grad_() for t in (q, k, v)]
            rough = _plain(*near, dtype, score, mask)
            plain = [rough, *torch.autograd.grad(rough, near, dout)]
            for name, ours, own, true in zip(
                ("out", "dq", "dk", "dv"), (made[0], *grads), plain, wanted, strict=False
            ):
                error = (ours.double() - true).square().mean().sqrt()
                own_error = (own.double() - true).square().mean().sqrt()
                errors[name] = float(error / own_error.clamp_min(1e-12))
            same = True
            for _ in range(3):
                again = call.forward(call.results())
                same &= torch.equal(again[0], made[0])
                same &= all(map(torch.equal, call.backward(again, dout, float("nan")), grads))
            right = errors["out"] <= 2 and max(errors.values()) <= 3 and same
            name = f"{str(dtype)[6:]} {dim} {rows}x{keys} {'causal' if causal else 'full'} {extra}"
            found[name] = {"error over plain": errors, "same bits": same, "right": right}
    assert af.__version__
    return found


def _peers(q: Any, k: Any, v: Any, causal: bool) -> dict[str, Callable[[], Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sdpa(kind: Any) -> Callable[[], Any]:
        def call() -> Any:
            with sdpa_kernel(kind):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    flex = torch.compile(flex_attention)
    blocks = (
        create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2]) if causal else None
    )
    return {
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "flex": lambda: flex(q, k, v, block_mask=blocks),
    }


def grid(quick: bool, keep: Callable[[str, Found], None]) -> None:
    for dim in DIMS[: 2 if quick else 3]:
        for length in LENGTHS if not quick else (2048, 8192):
            for causal in (False, True):
                keep(f"{dim} {length} {'causal' if causal else 'full'}", _cell(dim, length, causal, quick))


def _cell(dim: int, length: int, causal: bool, quick: bool) -> Found:
    heads, batch = WIDTH // dim, TOKENS // length
    q, k, v, dout = (
        torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    operations = 4 * length**2 * dim * heads * batch * (0.5 if causal else 1.0)
    call = Call(q, k, v, causal=causal)
    made = call.forward(call.results())
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    forward: dict[str, Callable[[], object]] = {"anyflash": lambda: call.forward(made)}
    backward: dict[str, Callable[[], object]] = {"anyflash": lambda: call.backward(made, dout)}
    failed = {}
    for name, peer in _peers(*leaves, causal).items():
        try:
            out = peer()
            torch.autograd.grad(out, leaves, dout, retain_graph=True)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            failed[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        forward[name] = peer
        backward[name] = lambda o=out: torch.autograd.grad(o, leaves, dout, retain_graph=True)
    seconds = 0.3 if quick else 0.8
    with torch.no_grad():
        found = {"forward": milliseconds(forward, seconds)}
    found["backward"] = milliseconds(backward, seconds)
    speed = {
        which: {n: operations * factor / ms / 1e9 for n, ms in found[which].items()}
        for which, factor in (("forward", 1.0), ("backward", 2.5))
    }
    return {"milliseconds": found, "TFLOP/s": speed, "failed": failed}


def markdown(found: Found) -> str:
    lines = ["# Attention on a GPU: anyflash's portable kernels and their peers", ""]
    lines += ["Written by `benchmarks/gpu_report.py`; not edited.", ""]
    lines += [f"- {key}: {value}" for key, value in found["machine"].items()]
    lines += [f"- {key}: {value:.0f}" for key, value in found.get("ceilings", {}).items()]
    wrong = [name for name, case in found.get("correctness", {}).items() if not case.get("right")]
    total = len(found.get("correctness", {}))
    lines += ["", f"Against float64: {total - len(wrong)} of {total} cases right.", ""]
    lines += [f"- wrong: {name}" for name in wrong]
    names = ("anyflash", "cudnn", "flash", "flex")
    for which in ("forward", "backward"):
        lines += [
            "",
            f"## {which}, bfloat16, TFLOP/s",
            "",
            "| head_dim, length | " + " | ".join(names) + " |",
        ]
        lines.append("|---|" + "---:|" * len(names))
        for cell, record in found.get("grid", {}).items():
            speed = record.get("TFLOP/s", {}).get(which, {})
            cells = [f"{speed[n]:.0f}" if n in speed else "-" for n in names]
            lines.append(f"| {cell} | " + " | ".join(cells) + " |")
    for part, error in found.get("errors", {}).items():
        lines += ["", f"## {part} failed", "", "```", error, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few cells only")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found: Found = {"machine": machine(), "grid": {}, "errors": {}}

    def save() -> None:
        (given.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.out / "gpu.md").write_text(markdown(found))

    def keep(cell: str, record: Found) -> None:
        found["grid"][cell] = record
        save()

    parts: dict[str, Callable[[], Any]] = {
        "ceilings": ceilings,
        "correctness": lambda: correctness(given.quick),
        "grid": lambda: grid(given.quick, keep) or found["grid"],
    }
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception:  # noqa: BLE001 - the other parts are worth having without this one
            found["errors"][name] = traceback.format_exc()
        save()
    sys.stdout.write((given.out / "gpu.md").read_text())
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
