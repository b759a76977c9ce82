"""The Hopper forward over a cache, as its launches make it, compiled for sm_90a: the figures of
shipped_hopper.py.

Run as a program it compiles the named ones, or all, and prints one JSON object: name -> figures.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from anyflash.contract import direct
from anyflash.kernels.gluon import launch, launch_decode, launch_pages, schedule
from anyflash.kernels.triton import offline
from anyflash.semantics.operands import Results
from gpu.shipped_hopper import HEADS, figures_of

BATCH, ROWS, SLOTS = 2, 1024, 4096
# name -> head dims, program, slots of a page (0: a dense cache), packed queries
SHIPPED: dict[str, tuple[int, int, dict[str, Any], int, bool]] = {
    "64 causal pages of 16": (64, 64, {"causal": True}, 16, False),
    "128 causal dense": (128, 128, {"causal": True}, 0, False),
    "128 packed causal pages of 16": (128, 128, {"causal": True}, 16, True),
    "192/128 packed causal pages of 16": (192, 128, {"causal": True}, 16, True),
    "256 causal pages of 256": (256, 256, {"causal": True}, 256, False),
}


def made(name: str) -> tuple[Any, schedule.Tiles]:
    """The compiled kernel of a configuration, and its tiles."""
    dim, dim_v, keywords, page, packed = SHIPPED[name]
    q = np.empty((BATCH, ROWS, HEADS, dim), np.float16)
    k, v = (np.empty((BATCH, 1, HEADS, d), np.float16) for d in (dim, dim_v))
    dense, operands = direct.prepare(q, k, v, **keywords)
    pages, slots = (BATCH * SLOTS // page, page) if page else (BATCH, SLOTS)
    problem = replace(
        dense,
        seqlen_k=SLOTS,
        addressing="paged",
        num_pages=pages,
        page_size=slots,
        seqused_k=True,
        packed=packed,
        seqlen_q=BATCH * ROWS if packed else ROWS,
        total_q=BATCH * ROWS if packed else 0,
    )
    view = direct.view_of
    operands = replace(
        operands,
        q=view(np.empty(problem.q_shape, np.float16)),
        k=view(np.empty(problem.k_shape, np.float16)),
        v=view(np.empty(problem.v_shape, np.float16)),
        seqused_k=view(np.empty(BATCH, np.int32)),
        cu_seqlens_q=view(np.empty(BATCH + 1, np.int32)) if packed else None,
        block_table=view(np.empty((BATCH, pages // BATCH), np.int32)) if page else None,
    )
    outputs = (
        np.empty(problem.out_shape, np.float16),
        np.empty(problem.lse_shape, np.float32),
        np.empty((2, *problem.lse_shape), np.float32),
    )
    results = Results(*(view(x, True) for x in outputs))
    assert launch_pages.unfit_for_many(problem, operands, results) is None
    launch.processors = lambda device: 132
    with offline.recorded("sm_90") as launches:
        launch_decode.forward(problem, operands, results)
    (found,) = [one for one in launches if one.kernel.is_gluon() and one.name == "forward"]
    compiled = offline.binary(found.kernel, "sm_90", *found.arguments, **found.constants)
    return compiled, launch.forward_tiles(problem)


def figures(name: str) -> dict[str, Any]:
    compiled, tiles = made(name)
    dim, dim_v, keywords, _page, _packed = SHIPPED[name]
    return figures_of(compiled, tiles, dim, dim_v, 2 if keywords else 1)


if __name__ == "__main__":
    json.dump({name: figures(name) for name in sys.argv[1:] or SHIPPED}, sys.stdout, indent=1)
