"""The portable GPU backend: Triton, on NVIDIA and AMD. Under TRITON_INTERPRET=1 it runs on the CPU,
slowly."""

from __future__ import annotations

import importlib.util
from typing import Any

from anyflash.core.device import Device
from anyflash.core.dtypes import FLOATS8, ITEMSIZE
from anyflash.core.view import View
from anyflash.semantics.cache import CacheCall
from anyflash.semantics.limits import integers_too_wide
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem

_DTYPES = ("float16", "bfloat16", "float32")
_GPUS = ("cuda", "hip")
_GREATEST_DIM = 576


class Triton:
    name = "triton"
    rank: int | None = 20
    accepts = "memory"

    def available(self) -> str | None:
        for package in ("triton", "torch"):
            if importlib.util.find_spec(package) is None:
                return f"needs {package}, which is not installed"
        from anyflash.kernels.triton.device import on_host

        if on_host():
            return None
        import torch

        return None if torch.cuda.is_available() else "torch sees no GPU"

    def decline(self, problem: Problem, device: Device) -> list[str]:
        from anyflash.kernels.triton.device import on_host

        wanted = ("cpu",) if on_host() else _GPUS
        if device.kind not in wanted:
            return [f"runs on {' and '.join(wanted)}, the arrays are on {device}"]
        reasons = integers_too_wide(problem)
        if problem.dtype not in (*_DTYPES, *FLOATS8):
            reasons.append(f"computes in float32, the arrays are {problem.dtype}")
        if max(problem.head_dim, problem.head_dim_v) > _GREATEST_DIM:
            reasons.append(f"head dims end at {_GREATEST_DIM}")
        return reasons

    def configure(self, problem: Problem) -> str:
        return "tiles by device"

    def forward(self, problem: Problem, config: str, operands: Operands, results: Results) -> None:
        from anyflash.kernels.triton import launch, launch_decode

        (launch_decode if launch_decode.serves(problem) else launch).forward(problem, operands, results)

    def backward(
        self, problem: Problem, config: str, operands: Operands, saved: Saved, grads: Gradients
    ) -> None:
        from anyflash.kernels.triton import launch_backward

        launch_backward.backward(problem, operands, saved, grads)

    def append(self, problem: Problem, config: str, call: CacheCall, turned: View | None) -> Operands:
        from anyflash.kernels.triton import launch_append

        return launch_append.append(problem, call, turned)

    def restate(self, problem: Problem, config: str, lse: View, stats: View) -> None:
        from anyflash.kernels.triton import launch_backward

        launch_backward.restate(problem, lse, stats)

    def explain(self, problem: Problem, config: str) -> dict[str, Any]:
        from anyflash.kernels.triton import launch_decode, schedule
        from anyflash.kernels.triton.device import present
        from anyflash.kernels.triton.narrow import narrow_of
        from anyflash.kernels.triton.precision import float32_products

        arch = present()
        narrow = narrow_of(problem, arch)
        size = narrow.itemsize(problem)
        found: dict[str, Any] = {"device": arch}
        dims, narrower = (problem.head_dim, problem.head_dim_v), problem.dtype_kv in FLOATS8
        few = tuple(launch_decode.kinds(problem)) if launch_decode.serves(problem) else ()
        for part in () if problem.addressing == "paged" else schedule.PARTS[: 1 if narrower else None]:
            if part != "forward" or not few:
                found[part] = str(schedule.tiles(part, arch, *dims, size, narrow.format != ""))
        for rows in few:
            size = max(2, ITEMSIZE[problem.dtype])
            tiles, cut = schedule.decode_tiles(rows, arch, *dims, size, narrower), schedule.cut(rows, arch)
            found[f"forward, {rows} rows"] = f"{tiles}, {cut}"
        if few and narrower:
            found["8-bit floats"] = "made float16, or the type of the queries"
        elif narrower:
            found["8-bit floats"] = "made float16" if narrow.format else "multiplied as they are, p in e4m3"
        if problem.dtype == "float32":
            width = schedule.padded(max(problem.head_dim, problem.head_dim_v))
            found["float32 products"] = "{}, {}".format(*float32_products(arch, width))
        return found


BACKEND = Triton()
