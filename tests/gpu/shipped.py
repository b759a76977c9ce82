"""The forward and both backward passes in the configurations that are shipped, at three widths, as stand-in
launches: what budgets are kept of. Not among them: careful launches, tables' gradients, and small kernels.

Run as a program it compiles them on two processes and prints one JSON object: name -> figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from anyflash.kernels.triton.schedule import PARTS

DIMS = (64, 128, 256)
PROGRAMS = {
    "plain": (None, None),
    "causal": (None, "(le k q)"),
    "everything": (
        "(sub (mul 30.0 (tanh (div score 30.0))) (mul (load 0:f head) (float (sub q k))))",
        "(and (le k q) (le (sub q 256) k))",
    ),
}
LENGTH, HEADS = 4096, 16


def names(targets: tuple[str, ...]) -> Iterator[str]:
    for arch in targets:
        for part in PARTS:
            for dim in DIMS:
                for program in PROGRAMS:
                    # The others at one width, to stay within minutes.
                    if program == "causal" or dim == 128:
                        yield f"{arch} {part} {dim} {program}"


def compile_one(name: str) -> dict[str, int]:
    import torch
    from offline import Stand, compiled

    from anyflash.kernels.triton import backward, forward, schedule
    from anyflash.kernels.triton.program import functions

    arch, part, size, program = name.split()
    dim = int(size)
    score, mask = PROGRAMS[program]
    dtypes = ("float32",) if score else ()
    made = functions(score, mask, dtypes)
    tiles = schedule.tiles(part, arch, dim, dim, 2)  # type: ignore[arg-type]
    wide, rest = schedule.split(dim)
    steps = (LENGTH * HEADS * dim, HEADS * dim, dim, 1)
    lse, stats = (HEADS * LENGTH, LENGTH, 1), (HEADS * LENGTH, HEADS * LENGTH, LENGTH, 1)
    x, f, i = Stand(torch.bfloat16), Stand(torch.float32), Stand(torch.int32)
    tables = ((f, (1,), (HEADS,)),) if score else ()
    numbers = (LENGTH // 64, 4, HEADS, 1, LENGTH, LENGTH, 0.1, 0.2, 5, 7, 1.0)
    constants: dict[str, Any] = {
        "SCORE": made.final_score,
        "ALLOWED": made.allowed,
        "TILE_CLASS": made.tile_class,
        "IDENTITY": made.identity,
        "MASK": made.masked,
        "DROPOUT": False,
        "PACKED": False,
        "USED": False,
        "CAREFUL": False,
        "PRECISION": "ieee",
        "DIM": dim,
        "WIDE": wide,
        "REST": rest,
        "DIM_V": dim,
        "WIDE_V": wide,
        "REST_V": rest,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    none = (None, None, None)
    if part == "forward":
        arguments = (x, x, x, x, f, f, i, None, *none, tables, steps, steps, steps, steps, lse, stats)
        return compiled(forward.forward, arch, *arguments, *numbers, SINKS=False, **constants).as_dict()
    constants["SLOPE"] = made.slope
    layout = (steps, steps, steps, steps, stats, lse, steps)
    if part == "backward_dkv":
        arguments = (x, x, x, x, f, f, x, x, i, *none, tables, *layout, steps)
        return compiled(backward.backward_dkv, arch, *arguments, *numbers, **constants).as_dict()
    arguments = (x, x, x, x, f, f, x, i, *none, tables, *layout)
    return compiled(backward.backward_dq, arch, *arguments, *numbers, **constants).as_dict()


def all_of(targets: tuple[str, ...]) -> dict[str, dict[str, int]]:
    wanted = list(names(targets))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(wanted, pool.map(compile_one, wanted), strict=True))


if __name__ == "__main__":
    json.dump(all_of(tuple(sys.argv[1:])), sys.stdout, indent=1)
