"""The Hopper forward of 8-bit floats in the configurations that are shipped, compiled for sm_90a as
shipped_hopper.py does it: what is in the machine code of each.

Run as a program it compiles the named ones, or all, and prints one JSON object: name -> figures.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np

from anyflash.contract import direct
from anyflash.kernels.gluon import launch, launch_fp8, schedule_fp8
from anyflash.kernels.triton import offline
from anyflash.semantics.arrays import numpy_dtype
from anyflash.semantics.descale import Descale
from anyflash.semantics.operands import Results
from gpu.machine_code import assembly, hopper_warnings, overlapped
from gpu.shipped_hopper import spilled_in_loops

LENGTH, HEADS = 4096, 16
_TURNS = r"\bLDSM\.16\.MT"
DTYPE = "float8_e4m3fn"
FACTORS = np.ones((1, HEADS), np.float32)
ALL = Descale(FACTORS, FACTORS, FACTORS, HEADS, DTYPE, DTYPE)
EVERYTHING: dict[str, Any] = {
    "causal": True,
    "softcap": 30.0,
    "window": (256, None),
    "alibi_slopes": np.ones(HEADS, np.float32),
    "descale": ALL,
}

# name -> head dims, program, packed
SHIPPED: dict[str, tuple[int, int, dict[str, Any], bool]] = {
    "64 plain": (64, 64, {}, False),
    "64 everything": (64, 64, EVERYTHING, False),
    "128 plain": (128, 128, {}, False),
    "128 causal": (128, 128, {"causal": True}, False),
    "128 causal, factors": (128, 128, {"causal": True, "descale": ALL}, False),
    "128 packed causal": (128, 128, {"causal": True}, True),
    "128 everything": (128, 128, EVERYTHING, False),
    "192/128 causal": (192, 128, {"causal": True}, False),
}


def made(name: str) -> Any:
    """The compiled kernel of a configuration."""
    dim, dim_v, keywords, packed = SHIPPED[name]
    tokens = (LENGTH,) if packed else (1, LENGTH)
    q, k, v = (np.empty((*tokens, HEADS, d), numpy_dtype(DTYPE)) for d in (dim, dim, dim_v))
    if packed:
        ends = np.array([0, LENGTH], np.int32)
        keywords = {**keywords, "cu_seqlens_q": ends, "cu_seqlens_k": ends}
    problem, operands = direct.prepare(q, k, v, **keywords)
    out = np.empty(problem.out_shape, numpy_dtype(problem.dtype_out))
    lse, stats = (np.empty((*planes, *problem.lse_shape), np.float32) for planes in ((), (2,)))
    results = Results(*(direct.view_of(x, True) for x in (out, lse, stats)))
    assert launch.unfit(problem, operands, results) is None
    launch.processors = lambda device: 132
    with offline.recorded("sm_90") as launches:
        launch_fp8.forward(problem, operands, results)
    (found,) = [one for one in launches if one.kernel.is_gluon()]
    return offline.binary(found.kernel, "sm_90", *found.arguments, **found.constants)


def figures(name: str) -> dict[str, Any]:
    """As shipped_hopper.py, and what turns v and what P goes through."""
    compiled = made(name)
    taken, code = offline.figures(compiled), assembly(compiled)
    blocks = re.split(r"^\s*\.L_x_\d+:", code, flags=re.MULTILINE)
    turning = "".join(block for block in blocks if re.search(_TURNS, block))
    dim, dim_v, keywords, _packed = SHIPPED[name]
    tiles = schedule_fp8.forward_tiles(dim, dim_v, "softcap" in keywords)
    return {
        "shared": taken.shared,
        "stack": taken.spilled,
        "registers": taken.registers,
        "wgmma": len(re.findall(r"\bQGMMA\b", code)),
        "reallocations": len(re.findall(r"\bUSETMAXREG\b", code)),
        "serialised": hopper_warnings(compiled),
        "overlapped": overlapped(code),
        "spilled_in_loops": spilled_in_loops(code, tiles.block_n // 2),
        "block_n": tiles.block_n,
        "loops": tiles.consumers * (2 if "causal" in keywords else 1),
        "accounted": schedule_fp8.shared_bytes(tiles, dim, dim_v),
        "turned": len(re.findall(_TURNS, turning)),
        "neighbours": neighbours(compiled.asm["ttgir"]),
        "single_bytes": len(re.findall(r"\b(?:LDS|STS)\.[US]8\b", turning)),
        "shuffles": max(
            len(re.findall(r"\bSHFL\b", block)) for block in blocks if re.search(r"\bQGMMA\b", block)
        ),
    }


def neighbours(text: str) -> list[int]:
    """How far apart a thread's first two operands of `byte_planes` lie, along each axis."""
    parents = set(re.findall(r'elementwise_inline_asm "prmt\.b32.*?parent = (#\w+)', text))
    (layout,) = (
        re.search(rf"^{name} = .*?register = \[\[([\d, ]+)\]", text, re.MULTILINE) for name in parents
    )
    assert layout is not None
    return [int(step) for step in layout[1].split(",")]


if __name__ == "__main__":
    json.dump({name: figures(name) for name in sys.argv[1:] or SHIPPED}, sys.stdout, indent=1)
