"""The kernel of calls over a cache in the configurations that are shipped, as stand-in launches: what
`decode_budgets.json` is kept of.

Run as a program it compiles them on two processes and prints one JSON object: name -> figures. A name is
architecture, rows, head_dim, program and how keys lie: one behind the other, in pages of 64, or of 16.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

NAMES = (
    "few 64 causal row",
    "few 128 plain row",
    "few 128 causal pages",
    "few 128 everything gather",
    "few 256 causal gather",
    "few 576 causal gather",
    "some 128 causal gather",
    "some 256 plain pages",
    "many 128 causal gather",
    "many 128 everything row",
)
PROGRAMS = {
    "plain": (None, None),
    "causal": (None, "(le k q)"),
    "everything": (
        "(sub (mul 30.0 (tanh (div score 30.0))) (mul (load 0:f head) (float (sub q k))))",
        "(and (le k q) (le (sub q 256) k))",
    ),
}
PAGES = {"row": 0, "pages": 64, "gather": 16}
HEADS, HEADS_KV, PAGES_OF_ALL = 32, 4, 4096


def launch(name: str, arch: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and constants of `decode.decode`."""
    import torch

    from anyflash.kernels.triton import schedule
    from anyflash.kernels.triton.program import functions
    from gpu.stand import Stand

    rows, size, program, layout = name.split()
    dim, page = int(size), PAGES[layout]
    score, mask = PROGRAMS[program]
    made = functions(score, mask, ("float32",) if score else ())
    chosen = schedule.decode_constants(rows, arch, dim, dim, 2, 1024)  # type: ignore[arg-type]
    x, f, i = Stand(torch.bfloat16), Stand(torch.float32), Stand(torch.int32)
    tables = ((f, (1,), (HEADS,)),) if score else ()
    q = (HEADS * dim, HEADS * dim, dim, 1)
    k = ((page or 1024) * HEADS_KV * dim, HEADS_KV * dim, dim, 1)
    lse, stats = (HEADS, 1, 1), (64 * HEADS, HEADS, 1, 1)
    table = i if page else None
    arrays = (x, x, x, x, f, f, f, i, None, None, i, table, None, tables, q, k, k, q, lse, stats, (64, 1))
    numbers = (2, 16, 64, HEADS, HEADS // HEADS_KV, 3, 8192, 0, 8192, PAGES_OF_ALL, 17, 128, 0.1, 0.2)
    # A mask of one interval is walked in one run, but for many rows.
    constants = {
        "SCORE": made.final_score,
        "ALLOWED": made.allowed,
        "TILE_CLASS": made.tile_class,
        "IDENTITY": made.identity,
        "MASK": made.masked,
        "TRIM": made.masked,
        "RUNS": made.masked and rows == "many",
        "HIDES": made.masked or not made.identity,
        "SINKS": False,
        "PACKED": False,
        "SEARCH": False,
        "USED": True,
        "PADDED": False,
        "PAGE": page,
        "GATHER": layout == "gather",
        "PRECISION": "ieee",
    }
    return arrays + numbers, constants | chosen


def compile_one(name: str) -> dict[str, int]:
    from anyflash.kernels.triton import decode
    from anyflash.kernels.triton.offline import compiled

    arch, rest = name.split(maxsplit=1)
    arguments, constants = launch(rest, arch)
    return compiled(decode.decode, arch, *arguments, **constants).as_dict()


def all_of(targets: tuple[str, ...]) -> dict[str, dict[str, int]]:
    wanted = [f"{arch} {name}" for arch in targets for name in NAMES]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(wanted, pool.map(compile_one, wanted), strict=True))


if __name__ == "__main__":
    json.dump(all_of(tuple(sys.argv[1:])), sys.stdout, indent=1)
