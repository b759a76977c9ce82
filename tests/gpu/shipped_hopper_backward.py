"""The Hopper backward in the configurations that are shipped, as its launches make them, compiled for sm_90a:
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
from anyflash.kernels.gluon import launch_backward
from anyflash.kernels.gluon import schedule_backward as tables
from anyflash.kernels.triton import offline
from anyflash.semantics.operands import Gradients, Saved
from gpu.machine_code import assembly, hopper_warnings, overlapped

LENGTH, HEADS = 4096, 16
_EVERYTHING: dict[str, Any] = {"causal": True, "softcap": 30.0, "window": (256, None), "alibi_slopes": True}

# Of dk and dv: name -> head dims, program, packed, deterministic. dq is compiled with the deterministic ones.
SHIPPED: dict[str, tuple[int, int, dict[str, Any], bool, bool]] = {
    "64 plain": (64, 64, {}, False, True),
    "64 causal": (64, 64, {"causal": True}, False, True),
    "64 plain added": (64, 64, {}, False, False),
    "64 causal added": (64, 64, {"causal": True}, False, False),
    "128 plain": (128, 128, {}, False, True),
    "128 causal": (128, 128, {"causal": True}, False, True),
    "128 packed causal": (128, 128, {"causal": True}, True, True),
    "128 everything": (128, 128, _EVERYTHING, False, True),
    "128 plain added": (128, 128, {}, False, False),
    "128 causal added": (128, 128, {"causal": True}, False, False),
    "96 plain": (96, 96, {}, False, True),
    "96 causal": (96, 96, {"causal": True}, False, True),
    "96 everything": (96, 96, _EVERYTHING, False, True),
    "192 128 causal": (192, 128, {"causal": True}, False, True),
    "192 plain": (192, 192, {}, False, True),
    "192 everything": (192, 192, _EVERYTHING, False, True),
    "192 dropout causal": (192, 192, {"dropout_p": 0.1, "causal": True}, False, True),
    "256 plain": (256, 256, {}, False, True),
    "64 dropout added": (64, 64, {"dropout_p": 0.1}, False, False),
    "128 dropout causal": (128, 128, {"dropout_p": 0.1, "causal": True}, False, True),
    "256 dropout causal": (256, 256, {"dropout_p": 0.1, "causal": True}, False, True),
    "256 causal": (256, 256, {"causal": True}, False, True),
    "256 packed causal": (256, 256, {"causal": True}, True, True),
    "256 everything": (256, 256, _EVERYTHING, False, True),
}


def recorded(name: str) -> list[offline.Launch]:
    """The launches of Hopper's kernels."""
    dim, dim_v, keywords, packed, deterministic = SHIPPED[name]
    tokens = (LENGTH,) if packed else (1, LENGTH)
    q, k, v = (np.empty((*tokens, HEADS, d), np.float16) for d in (dim, dim, dim_v))
    if packed:
        ends = np.array([0, LENGTH], np.int32)
        keywords = {**keywords, "cu_seqlens_q": ends, "cu_seqlens_k": ends}
    if "alibi_slopes" in keywords:
        keywords = {**keywords, "alibi_slopes": np.ones(HEADS, np.float32)}
    problem, operands = direct.prepare(q, k, v, deterministic=deterministic, **keywords)
    stats = np.empty((2, *problem.lse_shape), np.float32)
    out = np.empty(problem.out_shape, np.float16)
    saved = Saved(direct.view_of(out), direct.view_of(stats), direct.view_of(out))
    made = [direct.view_of(np.empty_like(x), True) for x in (q, k, v)]
    grads = Gradients(*made, tables=(None,) * len(problem.tables))
    assert launch_backward.unfit(operands, saved, grads) is None
    with offline.recorded("sm_90") as launches:
        launch_backward.backward(problem, operands, saved, grads)
    return [one for one in launches if one.kernel.is_gluon()]


def figures(name: str) -> dict[str, dict[str, Any]]:
    """For each kernel: bytes of shared memory and of the stack, counts of instructions, and what
    schedule_backward.py says."""
    dim, dim_v, *_ = SHIPPED[name]
    found = {}
    for one in recorded(name):
        form = one.constants["C"]
        keys = one.kernel.__name__ != "backward_dq"
        if keys:
            tiles = tables.keys_tiles(dim, dim_v, not form.identity, form.dropout)
            accounted = tables.keys_shared_bytes(tiles, dim, dim_v, form.reduce, form.dropout)
        else:
            tiles = tables.rows_tiles(dim, dim_v, form.guard or form.dropout)
            accounted = tables.rows_shared_bytes(tiles, dim, dim_v)
        made = offline.binary(one.kernel, "sm_90", *one.arguments, **one.constants)
        part = "keys" if keys else "rows"
        found[f"{name} {part}"] = {
            **_instructions(made),
            "accounted": accounted,
            # Of 64 keys or rows and a tile, or of half a tile where consumers share one.
            "exponentials": tiles.moving
            * 64
            // 128
            // (2 if keys and tables.wide(dim, dim_v, form.dropout) else 1),
            "added": form.reduce,
            "identity": form.identity,
        }
    return found


def _instructions(made: Any) -> dict[str, Any]:
    taken = offline.figures(made)
    code = assembly(made)
    counted = {"wgmma": r"\bHGMMA\b", "reallocations": r"\bUSETMAXREG\b", "reductions": r"\bUTMAREDG\b"}
    return {
        "shared": taken.shared,
        "stack": taken.spilled,
        "serialised": hopper_warnings(made),
        # Places that have any: there p is computed under dout . v.
        "overlapped": [count for count in overlapped(code) if count],
        **{name: len(re.findall(pattern, code)) for name, pattern in counted.items()},
    }


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(SHIPPED)
    json.dump({key: value for name in wanted for key, value in figures(name).items()}, sys.stdout, indent=1)
