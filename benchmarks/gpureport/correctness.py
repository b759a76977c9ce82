"""Kernels against float64, in memory that holds NaN, and again for the same bits; cases of the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpureport.calls import Case, definition, make
from gpureport.place import Clock, Place

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
REPEATS, HOPPER_REPEATS = 3, 20


def cases(place: Place, backend: str) -> list[Case]:
    """The most telling first."""
    if place.dry and backend == "hopper":
        return [
            Case("bfloat16", 64, 40, 130, True, batch=1, heads=4, kv_heads=1, backend=backend),
            Case("float16", 128, 40, 70, False, "softcap, ALiBi", 1, 2, 1, backend),
            Case("float16", 64, 70, 70, True, "dropout", 1, 2, 1, backend),
            Case("bfloat16", 192, 40, 70, True, batch=1, heads=2, kv_heads=1, backend=backend, dim_v=128),
        ]
    if place.dry:
        return [
            Case("bfloat16", 32, 33, 40, True, batch=1, heads=2, kv_heads=1, backend=backend),
            Case("float32", 16, 20, 20, False, "softcap, ALiBi", 1, 2, 1, backend),
            Case("float16", 16, 20, 37, True, "bias", 1, 2, 1, backend),
        ]
    return list(_cases(place.quick, backend))


def _cases(quick: bool, backend: str) -> Iterator[Case]:
    hopper = backend == "hopper"
    dtypes = ("bfloat16", "float16") if hopper else ("bfloat16", "float16", "float32")
    odd = () if quick else (96, 192, 256) if hopper else (40, 80, 96, 192, 256, 576)
    for dim in (128, 64, *odd):
        for dtype in dtypes:
            for rows, keys in ((257, 385), (128, 128), *(((2048, 2048),) if hopper else ())):
                for causal in (True, False):
                    yield Case(dtype, dim, rows, keys, causal, backend=backend)
    for causal in (True, False):
        yield Case("bfloat16", 192, 257, 385, causal, backend=backend, dim_v=128)
        for extra in ("softcap, ALiBi", "bias"):
            yield Case("bfloat16", 64, 257, 385, causal, extra, backend=backend)
        # Few rows of a large group; dropout, with every kernel that Hopper has for it.
        yield Case("bfloat16", 128, 40, 900, causal, heads=16, kv_heads=2, backend=backend)
        for dim in (64, 128) if quick else (64, 128, 256):
            yield Case("bfloat16", dim, 257, 385, causal, "dropout", backend=backend)


def correctness(
    place: Place, clock: Clock, part: str, keep: Callable[[str, Any], None], backend: str
) -> None:
    """Errors (root mean square) over those of plain attention in the same dtype."""
    torch.manual_seed(0)
    skipped: list[str] = []
    for case in clock.while_time(part, cases(place, backend), skipped):
        keep(str(case), check(case, place))
    if skipped:
        keep("no time for", skipped)


def check(case: Case, place: Place) -> dict[str, Any]:
    made = make(case, place.device)
    call = made.call
    # Under the interpreter arrays are on the CPU, and the plan says itself whether they may be.
    if why := call.declined():
        return {"declined": why}
    found = call.forward(call.results())
    grads = call.backward(found, made.dout, float("nan"))
    wanted = definition(made, torch.float64)
    plain = definition(made, getattr(torch, case.dtype))
    errors = {}
    for name, ours, own, true in zip(
        ("out", "dq", "dk", "dv"), (found[0], *grads), plain, wanted, strict=False
    ):
        error = (ours.double() - true).square().mean().sqrt()
        own_error = (own.double() - true).square().mean().sqrt()
        least = torch.finfo(ours.dtype).eps * true.square().mean().sqrt() / 8
        errors[name] = float(error / own_error.clamp_min(least))
    same = True
    for _ in range(1 if place.dry else HOPPER_REPEATS if case.backend == "hopper" else REPEATS):
        again = call.forward(call.results())
        same &= all(map(torch.equal, again, found))
        same &= all(map(torch.equal, call.backward(again, made.dout, float("nan")), grads))
    right = errors["out"] <= FORWARD_FACTOR and max(errors.values()) <= GRADIENT_FACTOR and same
    # A NaN is no number above a bound: it must not pass for one below.
    right = right and all(value == value for value in errors.values())
    return {"error over plain": errors, "same bits": same, "right": right}


def contract(
    place: Place, clock: Clock, part: str, keep: Callable[[str, Any], None], backends: tuple[str, ...]
) -> None:
    """Cases of the contract's table, spread over it, in poisoned memory with every layout, each on every
    backend."""
    from anyflash.contract.run import run
    from anyflash.contract.table import table

    rows = [case for case in table() if case.dtype != "float64" and max(case.lens) <= 300]
    # Every seventh first, then those beside them: what fits in the time is spread.
    spread = [rows[i] for start in range(7) for i in range(start, len(rows), 7)]
    wanted = [(case, backend) for case in (spread[:2] if place.dry else spread) for backend in backends]
    counts = {backend: {"ran": 0, "failed": 0, "declined": 0, "of": len(rows)} for backend in backends}
    for case, backend in clock.while_time(part, wanted, []):
        count = counts[backend]
        try:
            report = run(case, backend)
            said = report.failures
            count["declined"] += bool(report.declined)
        except Exception as error:  # noqa: BLE001 - a case that cannot run is a case that failed
            said = [f"{type(error).__name__}: {error}"]
        count["ran"] += 1
        if said:
            count["failed"] += 1
            keep(f"failed: {backend} {case.id}", said[:3])
        keep(f"cases on {backend}", count)
