"""The backend for Hopper GPUs (sm_90): Gluon's warp-specialised kernels. Not yet run on a GPU.

What it declines the portable backend serves. It also hands on, call by call and said in the log, what only
the arrays show: TMA wants each array to start at a multiple of 16 bytes, rows a positive multiple of 16 bytes
apart, and a head's elements side by side; slices of a packed qkv are so. Both backends write the same stats,
so that the portable backward follows either forward.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

from anyflash.backends.triton import BACKEND as PORTABLE
from anyflash.core.device import Device
from anyflash.core.dtypes import FLOATS8
from anyflash.core.log import logger
from anyflash.core.view import View
from anyflash.semantics.cache import CacheCall
from anyflash.semantics.limits import integers_too_wide
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem

_DTYPES = ("float16", "bfloat16")
_CAPABILITY = (9, 0)
_DIMS = range(33, 257)
# Of 8-bit floats: sums are in registers twice, of a tile and of all.
_GREATEST_DIM_V8 = 128
_MOST_TOKENS = 2**30
_OTHER_ARRAYS = "go to the portable kernels: TMA wants 16 bytes, a head's elements together"


class Hopper:
    name = "hopper"
    rank: int | None = 15
    accepts = "memory"

    def available(self) -> str | None:
        for package in ("triton", "torch"):
            if importlib.util.find_spec(package) is None:
                return f"needs {package}, which is not installed"
        from anyflash.kernels.gluon.versions import unsupported

        if why := unsupported(importlib.metadata.version("triton")):
            return why
        from anyflash.kernels.triton.device import interpreted

        if interpreted():
            return "Triton's interpreter does not know Gluon"
        import torch

        if not torch.cuda.is_available() or torch.version.hip:
            return "torch sees no NVIDIA GPU"
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        if _CAPABILITY in found:
            return None
        return f"is for compute capability 9.0, here is {', '.join(f'{a}.{b}' for a, b in found)}"

    def decline(self, problem: Problem, device: Device) -> list[str]:
        if device.kind != "cuda":
            return [f"runs on cuda, the arrays are on {device}"]
        from anyflash.kernels.triton.device import architecture

        if (found := architecture(device)) != "sm_90":
            return [f"is for sm_90, {device} is {found}"]
        reasons = self.lacks(problem)
        if problem.program.mask is not None:
            from anyflash.kernels.gluon.assembler import doubtful

            if why := doubtful():
                reasons.append(why)
        return reasons

    def lacks(self, problem: Problem) -> list[str]:
        """What of a problem its kernels do not know."""
        reasons = integers_too_wide(problem)
        narrow = problem.dtype in FLOATS8
        if not narrow and problem.dtype not in _DTYPES:
            known = ", ".join((*_DTYPES, *FLOATS8))
            reasons.append(f"multiplies {known}, the arrays are {problem.dtype}")
        if problem.dtype_kv != problem.dtype:
            reasons.append(f"multiplies no {problem.dtype} by {problem.dtype_kv}")
        if any(dim not in _DIMS for dim in (problem.head_dim, problem.head_dim_v)):
            reasons.append(
                f"head dims are from {_DIMS[0]} to {_DIMS[-1]}, here {problem.head_dim} and "
                f"{problem.head_dim_v}: narrower ones would leave half of a tile empty"
            )
        from anyflash.kernels.gluon import launch_decode

        if launch_decode.serves(problem):
            reasons += launch_decode.lacks(problem)
        if narrow and problem.program.dropout_p:
            reasons.append("has no dropout for 8-bit floats")
        if narrow and problem.head_dim_v > _GREATEST_DIM_V8:
            reasons.append(f"v of 8-bit floats has at most {_GREATEST_DIM_V8} columns")
        if max(problem.total_q, problem.total_k) >= _MOST_TOKENS:
            reasons.append(f"packed tokens end at {_MOST_TOKENS}")
        return reasons

    def configure(self, problem: Problem) -> str:
        return "tiles by head_dim"

    def forward(self, problem: Problem, config: str, operands: Operands, results: Results) -> None:
        from anyflash.kernels.gluon import launch, launch_decode, launch_fp8

        if launch_decode.serves(problem):
            why, run = launch_decode.unfit(problem, operands), launch_decode.forward
        else:
            why = launch.unfit(problem, operands, results)
            run = (launch_fp8 if problem.dtype in FLOATS8 else launch).forward
        if why is None:
            run(problem, operands, results)
            return
        logger.info("forward on hopper: the portable kernels, as %s", why)
        PORTABLE.forward(problem, config, operands, results)

    def backward(
        self, problem: Problem, config: str, operands: Operands, saved: Saved, grads: Gradients
    ) -> None:
        from anyflash.kernels.gluon import launch_backward

        why = launch_backward.unfit(operands, saved, grads)
        if why is None:
            launch_backward.backward(problem, operands, saved, grads)
            return
        logger.info("backward on hopper: the portable kernels, as %s", why)
        PORTABLE.backward(problem, config, operands, saved, grads)

    def append(self, problem: Problem, config: str, call: CacheCall, turned: View | None) -> Operands:
        return PORTABLE.append(problem, config, call, turned)

    def restate(self, problem: Problem, config: str, lse: View, stats: View) -> None:
        PORTABLE.restate(problem, config, lse, stats)

    def explain(self, problem: Problem, config: str) -> dict[str, Any]:
        from anyflash.kernels.gluon import launch, launch_decode, schedule, schedule_backward

        if problem.dtype in FLOATS8:
            return self._explain_narrow(problem)
        program = problem.program
        tiles = schedule.forward_tiles(
            problem.head_dim,
            problem.head_dim_v,
            program.mask is not None,
            program.score is not None,
            program.dropout_p > 0,
        )
        shared = schedule.shared_bytes(tiles, problem.head_dim, problem.head_dim_v)
        dims, dropped = (problem.head_dim, problem.head_dim_v), program.dropout_p > 0
        scored = program.score is not None or problem.scale <= 0
        keys = schedule_backward.keys_tiles(*dims, scored, dropped)
        more = program.mask is not None or program.score is not None or dropped
        rows = schedule_backward.rows_tiles(*dims, more)
        by_keys = f"by {rows.moving} keys in {rows.stages} stages"
        if not program.deterministic and schedule_backward.adds(*dims, scored, dropped):
            by_keys = "added up in float32 on the way, in no fixed order"
        by_rows = f"of {keys.held} keys by {keys.moving} rows in {keys.stages} stages"
        found = {"device": "sm_90"}
        if launch_decode.serves(problem):
            found |= launch_decode.explain(problem)
        else:
            together = launch.heads_together(problem)
            heads = f", {together} heads of a group in a tile" if together > 1 else ""
            found["forward"] = f"{tiles}, {shared} bytes of shared memory{heads}"
        if problem.addressing != "paged":
            found["backward"] = f"dk and dv {by_rows}, dq {by_keys}"
        return found | {
            "other arrays": _OTHER_ARRAYS,
            "block_q": tiles.block_m,
            "block_k": tiles.block_n,
        }

    def _explain_narrow(self, problem: Problem) -> dict[str, Any]:
        from anyflash.kernels.gluon import schedule_fp8

        dims, score = (problem.head_dim, problem.head_dim_v), problem.program.score
        scored = score is not None and not schedule_fp8.only_scales(score)
        tiles = schedule_fp8.forward_tiles(*dims, scored)
        return {
            "device": "sm_90",
            "forward": f"{tiles}, {schedule_fp8.shared_bytes(tiles, *dims)} bytes of shared memory",
            "8-bit floats": "multiplied as they are, p in e4m3; v turned in shared memory",
            "other arrays": _OTHER_ARRAYS,
            "block_q": tiles.block_m,
            "block_k": tiles.block_n,
        }


BACKEND = Hopper()
