"""The Hopper kernel of calls over a cache in the configurations that are shipped, as its launches make it,
compiled for sm_90a: what is in the machine code of each.

Run as a program it compiles the named ones, or all, and prints one JSON object: name -> figures. A name is
rows of a group, head dims, program and how keys lie: one behind the other, or in pages.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np

from anyflash.contract import direct
from anyflash.kernels.gluon import launch_decode, schedule_decode
from anyflash.kernels.triton import offline
from anyflash.semantics.operands import Operands, Results
from anyflash.semantics.problem import Problem, Program, TableSpec
from gpu.machine_code import assembly, hopper_warnings
from gpu.shipped_decode import PROGRAMS

NAMES = (
    "8 64 plain row",
    "8 128 plain row",
    "8 128 plain pages",
    "16 128 causal gather",
    "16 128 everything gather",
    "64 128 causal pages",
    "128 128 causal pages",
    "8 96 causal row",
    "16 192/128 causal pages",
    "8 256 plain row",
    "64 256 causal pages",
    "128 256 causal pages",
)
PAGES = {"row": 0, "pages": 64, "gather": 16}
HEADS_KV, BATCH, KEYS = 4, 2, 8192


def call_of(name: str) -> tuple[Problem, Operands, Results]:
    """Of one token a sequence, of two where there is a mask."""
    rows, size, program, layout = name.split()
    dim, dim_v = map(int, (size if "/" in size else f"{size}/{size}").split("/"))
    score, mask = PROGRAMS[program]
    tokens = 1 if mask is None else 2
    heads = int(rows) // tokens * HEADS_KV
    page = PAGES[layout] or KEYS
    pages = BATCH * KEYS // page
    tables = (np.ones(heads, np.float32),) if score else ()
    problem = Problem(
        Program(score, mask),
        "float16",
        BATCH,
        heads,
        HEADS_KV,
        tokens,
        KEYS,
        dim,
        dim_v,
        tables=tuple(TableSpec("float32", table.shape) for table in tables),
        addressing="paged",
        num_pages=pages,
        page_size=page,
        seqused_k=True,
    )
    arrays = [np.empty(shape, np.float16) for shape in (problem.q_shape, problem.k_shape, problem.v_shape)]
    block_table = np.zeros((BATCH, KEYS // page), np.int32)
    operands = Operands(
        *[direct.view_of(array) for array in arrays],
        tables=tuple(direct.view_of(table) for table in tables),
        seqused_k=direct.view_of(np.zeros(BATCH, np.int32)),
        block_table=direct.view_of(block_table) if PAGES[layout] else None,
    )
    out = np.empty(problem.out_shape, np.float16)
    lse, stats = (np.empty((*planes, *problem.lse_shape), np.float32) for planes in ((), (2,)))
    return problem, operands, Results(*(direct.view_of(x, True) for x in (out, lse, stats)))


def made(name: str) -> Any:
    """The compiled kernel of a configuration."""
    problem, operands, results = call_of(name)
    assert launch_decode.unfit(problem, operands) is None
    with offline.recorded("sm_90") as launches:
        launch_decode.forward(problem, operands, results)
    found = next(one for one in launches if one.kernel.is_gluon())
    return offline.binary(found.kernel, "sm_90", *found.arguments, **found.constants)


def figures(name: str) -> dict[str, Any]:
    """Bytes of shared memory and of the stack, counts of instructions, and what schedule_decode.py says."""
    problem, _, _ = call_of(name)
    dims = problem.head_dim, problem.head_dim_v
    tiles = schedule_decode.tiles(*dims, problem.seqlen_q * problem.group)
    compiled = made(name)
    taken, code = offline.figures(compiled), assembly(compiled)
    return {
        "shared": taken.shared,
        "stack": taken.spilled,
        "registers": taken.registers,
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "reallocations": len(re.findall(r"\bUSETMAXREG\b", code)),
        "serialised": hopper_warnings(compiled),
        "accounted": schedule_decode.shared_bytes(tiles, *dims),
        "room": schedule_decode.SHARED_BYTES[tiles.blocks],
        "launched": tiles.launched_registers or 255,
    }


if __name__ == "__main__":
    json.dump({name: figures(name) for name in sys.argv[1:] or NAMES}, sys.stdout, indent=1)
