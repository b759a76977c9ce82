"""The Hopper forward in the configurations that are shipped, as its launches make it, compiled for sm_90a:
what is in the machine code of each.

Run as a program it compiles the named ones, or all, and prints one JSON object: name -> figures.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np

from anyflash.contract import direct
from anyflash.kernels.gluon import launch, schedule
from anyflash.kernels.triton import offline
from anyflash.semantics.operands import Results
from gpu.machine_code import assembly, hopper_warnings, overlapped

LENGTH, HEADS = 4096, 16
# Of calls whose tiles have several heads.
SHORT, GROUP = 40, 8


def _alibi() -> dict[str, Any]:
    return {
        "causal": True,
        "softcap": 30.0,
        "window": (256, None),
        "alibi_slopes": np.ones(HEADS, np.float32),
    }


# name -> head dims, program, packed
SHIPPED: dict[str, tuple[int, int, dict[str, Any], bool]] = {
    "64 plain": (64, 64, {}, False),
    "64 causal": (64, 64, {"causal": True}, False),
    "64 everything": (64, 64, _alibi(), False),
    "128 plain": (128, 128, {}, False),
    "128 causal": (128, 128, {"causal": True}, False),
    "128 packed causal": (128, 128, {"causal": True}, True),
    "128 everything": (128, 128, _alibi(), False),
    "96 plain": (96, 96, {}, False),
    "96 causal": (96, 96, {"causal": True}, False),
    "96 everything": (96, 96, _alibi(), False),
    "192 plain": (192, 192, {}, False),
    "192 causal": (192, 192, {"causal": True}, False),
    "192 everything": (192, 192, _alibi(), False),
    "192/128 plain": (192, 128, {}, False),
    "192/128 causal": (192, 128, {"causal": True}, False),
    "192/128 everything": (192, 128, _alibi(), False),
    "128 members causal": (128, 128, {"causal": True}, False),
    "192/128 members everything": (192, 128, _alibi(), False),
    "64 dropout": (64, 64, {"dropout_p": 0.1}, False),
    "128 dropout causal": (128, 128, {"dropout_p": 0.1, "causal": True}, False),
    "192/128 dropout": (192, 128, {"dropout_p": 0.1}, False),
    "256 dropout causal": (256, 256, {"dropout_p": 0.1, "causal": True}, False),
    "128 dropout everything": (128, 128, {"dropout_p": 0.1, **_alibi()}, False),
    "256 plain": (256, 256, {}, False),
    "256 causal": (256, 256, {"causal": True}, False),
    "256 everything": (256, 256, _alibi(), False),
}


def made(name: str) -> tuple[Any, schedule.Tiles]:
    """The compiled kernel of a configuration, and its tiles."""
    dim, dim_v, keywords, packed = SHIPPED[name]
    tokens = (LENGTH,) if packed else (1, LENGTH)
    q, k, v = (np.empty((*tokens, HEADS, d), np.float16) for d in (dim, dim, dim_v))
    if "members" in name:
        q, k, v = q[:, :SHORT], k[:, :, ::GROUP], v[:, :, ::GROUP]
    if packed:
        ends = np.array([0, LENGTH], np.int32)
        keywords = {**keywords, "cu_seqlens_q": ends, "cu_seqlens_k": ends}
    problem, operands = direct.prepare(q, k, v, **keywords)
    stats = np.empty((2, *problem.lse_shape), np.float32)
    outputs = np.empty(problem.out_shape, np.float16), np.empty(problem.lse_shape, np.float32), stats
    results = Results(*(direct.view_of(x, True) for x in outputs))
    assert launch.unfit(problem, operands, results) is None
    launch.processors = lambda device: 132
    with offline.recorded("sm_90") as launches:
        launch.forward(problem, operands, results)
    (found,) = [one for one in launches if one.kernel.is_gluon()]
    compiled = offline.binary(found.kernel, "sm_90", *found.arguments, **found.constants)
    return compiled, launch.forward_tiles(problem)


def figures(name: str) -> dict[str, Any]:
    compiled, tiles = made(name)
    dim, dim_v, keywords, _packed = SHIPPED[name]
    return figures_of(compiled, tiles, dim, dim_v, 2 if "causal" in keywords else 1)


def figures_of(compiled: Any, tiles: schedule.Tiles, dim: int, dim_v: int, loops: int) -> dict[str, Any]:
    """Bytes of shared memory and of the stack, counts of instructions, and what schedule.py says. `loops`:
    those that a consumer has products in."""
    taken = offline.figures(compiled)
    code = assembly(compiled)
    return {
        "shared": taken.shared,
        "stack": taken.spilled,
        "registers": taken.registers,
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "reallocations": len(re.findall(r"\bUSETMAXREG\b", code)),
        "serialised": hopper_warnings(compiled),
        "overlapped": overlapped(code),
        "spilled_in_loops": spilled_in_loops(code, tiles.block_n // 2),
        "block_n": tiles.block_n,
        "loops": tiles.consumers * loops,
        "accounted": schedule.shared_bytes(tiles, dim, dim_v),
    }


def spilled_in_loops(code: str, first: int) -> int:
    """Loads and stores of spilled registers in blocks with products, but for that of an item's first tile,
    the only one with so few exponentials: `first`."""
    total = 0
    for block in re.split(r"^\s*\.L_x_\d+:", code, flags=re.MULTILINE):
        exponentials = len(re.findall(r"\bMUFU\.EX2\b", block))
        if re.search(r"\b[HQ]GMMA\b", block) and not 0 < exponentials <= first:
            total += len(re.findall(r"\b(?:LDL|STL)\b", block))
    return total


if __name__ == "__main__":
    json.dump({name: figures(name) for name in sys.argv[1:] or SHIPPED}, sys.stdout, indent=1)
