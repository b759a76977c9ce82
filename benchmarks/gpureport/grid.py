"""Speed at 16384 tokens, beside torch's own attention, and variants of Hopper's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import product
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpureport.calls import Case, Made, make
from gpureport.place import Clock, Place

TOKENS, WIDTH = 16384, 2048
LENGTHS = (8192, 2048, 16384, 4096, 1024, 512)
DIMS = (128, 64, 256)
# Hopper's backward with deterministic=False.
ANY_ORDER = "hopper, any order"
# More than there are work items.
_EVERY_ITEM = 2**30
Keep = Callable[[str, Any], None]


def cells(place: Place) -> list[Case]:
    """Case of each cell, the most asked for first; the heads are filled in for the width."""
    if place.dry:
        return [Case("bfloat16", 64, 40, 40, causal, "plain", 1, 1, 1) for causal in (True, False)]
    dims, lengths = (DIMS[:2], LENGTHS[:2]) if place.quick else (DIMS, LENGTHS)
    return [
        Case("bfloat16", dim, length, length, causal, "plain", TOKENS // length, WIDTH // dim, WIDTH // dim)
        for length in lengths
        for dim in dims
        for causal in (False, True)
    ]


def cell_name(case: Case) -> str:
    return f"{case.dim} {case.rows} {'causal' if case.causal else 'full'}"


def operations(case: Case) -> float:
    """Of a forward; a backward has 2.5 times as many."""
    return 4 * case.rows * case.keys * case.dim * case.heads * case.batch * (0.5 if case.causal else 1.0)


def grid(place: Place, clock: Clock, part: str, keep: Keep, ours: tuple[str, ...]) -> None:
    skipped: list[str] = []
    wanted = cells(place)
    for done, case in enumerate(clock.while_time(part, wanted, skipped)):
        # Two measurements a cell, and as long again for what is compiled.
        seconds = min(0.8, max(0.1, clock.left(part) / (len(wanted) - done) / 4))
        keep(cell_name(case), cell(case, place, ours, seconds))
        place.forget()
    if skipped:
        keep("no time for", skipped)


def cell(case: Case, place: Place, ours: tuple[str, ...], seconds: float) -> dict[str, Any]:
    failed: dict[str, str] = {}
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    made = make(case, place.device)
    for name, backend, deterministic in _forms(ours):
        try:
            ran = _own(replace(case, backend=backend), made, deterministic)
        except Exception as error:  # noqa: BLE001 - whatever one raises is its result
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        backward[name] = ran[1]
        if name == backend:
            forward[name] = ran[0]
    leaves = [t.detach().requires_grad_() for t in made.call.arrays]
    for name, peer in _peers(*leaves, case.causal, place).items():
        try:
            out = peer()
            torch.autograd.grad(out, leaves, made.dout, retain_graph=True)
        except Exception as error:  # noqa: BLE001 - as above
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        forward[name] = peer
        backward[name] = lambda o=out: torch.autograd.grad(o, leaves, made.dout, retain_graph=True)
    if not forward:
        return {"failed": failed}
    with torch.no_grad():
        found = {"forward": place.milliseconds(forward, seconds)}
    found["backward"] = place.milliseconds(backward, seconds)
    speed = {
        which: {n: operations(case) * factor / ms / 1e9 for n, ms in found[which].items()}
        for which, factor in (("forward", 1.0), ("backward", 2.5))
    }
    return {"milliseconds": found, "TFLOP/s": speed, "failed": failed}


def _forms(ours: tuple[str, ...]) -> Iterator[tuple[str, str, bool]]:
    """Name, backend and whether the backward adds in one order; the peers do not."""
    for backend in ours:
        yield backend, backend, True
        if backend == "hopper":
            yield ANY_ORDER, backend, False


def _own(case: Case, made: Made, deterministic: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    from gpureport.calls import Call

    call = Call(*made.call.arrays, case.backend, causal=case.causal, deterministic=deterministic)
    if why := call.declined():
        raise NotImplementedError("; ".join(why))
    results = call.forward(call.results())
    call.backward(results, made.dout)
    return lambda: call.forward(results), lambda: call.backward(results, made.dout)


def _peers(q: Any, k: Any, v: Any, causal: bool, place: Place) -> dict[str, Callable[[], Any]]:
    def sdpa(kind: Any) -> Callable[[], Any]:
        def call() -> Any:
            with sdpa_kernel(kind):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    if place.dry:
        return {"math": sdpa(SDPBackend.MATH)}
    found = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    if q.shape[2] in (2048, 8192):
        # Compiled for each shape, which takes seconds: not in every cell.
        found["flex"] = _flex(q, k, v, causal)
    return found


def _flex(q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    blocks: list[Any] = []

    def call() -> Any:
        if not blocks:
            rule = lambda b, h, i, j: i >= j
            blocks.append(
                create_block_mask(rule, None, None, q.shape[2], k.shape[2], device=q.device)
                if causal
                else None
            )
        return compiled(q, k, v, block_mask=blocks[0])

    return call


def sweep(place: Place, clock: Clock, part: str, keep: Keep) -> None:
    """Hopper's forward with other stages, widths, turns and buffers than its table has, and with a program
    for each work item in place of persistent ones: each is checked against the table's own result before it
    is timed."""
    from anyflash.kernels.gluon import launch, schedule

    case = Case("bfloat16", 128, 8192, 8192, True, "plain", 2, 16, 16, "hopper")
    if place.dry:
        case = replace(case, rows=70, keys=200, batch=1, heads=2, kv_heads=1)
    made = make(case, place.device)
    call = made.call
    if why := call.declined():
        keep("declined", why)
        return
    table, processors = schedule._FORWARD, launch.processors
    key = schedule.padded(case.dim), schedule.padded(case.dim)
    shipped = table[key]
    wanted = call.forward(call.results())[0].float()
    try:
        keep(str(shipped), _variant(case, call, wanted, place))
        launch.processors = lambda device: _EVERY_ITEM
        keep("a program for each item", _variant(case, call, wanted, place))
        launch.processors = processors
        variants = list(_variants(schedule, shipped, case.dim))
        for tiles in clock.while_time(part, variants[:2] if place.dry else variants, []):
            table[key] = tiles
            keep(str(tiles), _variant(case, call, wanted, place))
    finally:
        table[key], launch.processors = shipped, processors


def _variant(case: Case, call: Any, wanted: Any, place: Place) -> dict[str, Any]:
    try:
        results = call.forward(call.results())
        off = float((results[0].float() - wanted).abs().max())
        if not off <= 4 * torch.finfo(torch.bfloat16).eps * float(wanted.abs().max()):
            return {"wrong by": off}
        ms = place.milliseconds({"forward": lambda: call.forward(results)}, 0.5)["forward"]
        return {"milliseconds": ms, "TFLOP/s": operations(case) / ms / 1e9}
    except Exception as error:  # noqa: BLE001 - a variant that does not compile is a result
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _variants(schedule: Any, shipped: Any, dim: int) -> Iterator[Any]:
    """Of each field that steers the pipeline a few values, those that fit in shared memory."""
    values = {"stages": (2, 3), "turns": (0, 1, 2), "block_n": (64, 128), "own_out": (True, False)}
    known = {name: values[name] for name in values if name in {f.name for f in fields(shipped)}}
    for chosen in product(*known.values()):
        tiles = replace(shipped, **dict(zip(known, chosen, strict=True)))
        if tiles != shipped and schedule.shared_bytes(tiles, dim, dim) <= schedule.SHARED_BYTES:
            yield tiles
