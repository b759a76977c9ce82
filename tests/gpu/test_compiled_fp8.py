"""8-bit floats compiled for GPUs that are not here, as they are launched: which instructions multiply, and
that nothing is spilled beyond what is said here."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)
pytest.importorskip("torch")

import numpy as np
import torch
import triton

from anyflash.contract import direct
from anyflash.kernels.triton import decode, forward, launch, launch_decode, offline
from anyflash.kernels.triton.device import Pointer
from anyflash.semantics.arrays import numpy_dtype
from anyflash.semantics.cache import Integers, describe_cache
from anyflash.semantics.descale import Descale
from anyflash.semantics.describe import describe_program
from gpu.machine_code import assembly
from gpu.stand import Stand

NEW = triton.__version__ >= "3.9"
# The instruction that multiplies 8-bit floats, by architecture; where there is none, that of float16.
NATIVE = {"sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA"}
HALF = {"sm_80": "HMMA", "gfx942": "v_mfma_f32_.*f16", "sm_90": "HGMMA|HMMA"}


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.launches.append((arguments, constants))


def stand(argument: Any) -> Any:
    if isinstance(argument, (Pointer, torch.Tensor)):
        return Stand(argument.dtype)
    return tuple(map(stand, argument)) if isinstance(argument, tuple) else argument


def launched(
    monkeypatch: pytest.MonkeyPatch, arch: str, module: Any, name: str, run: Any
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What `run()` launches of one kernel on a device of this architecture."""
    kernel, recorder = getattr(module, name), Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, recorder)
        for file in (launch, launch_decode):
            patch.setattr(file, "architecture", lambda device: arch)
        run()
    return [(kernel, tuple(map(stand, arguments)), constants) for arguments, constants in recorder.launches]


def products(call: Any, arch: str) -> tuple[offline.Made, set[str]]:
    """A launch's figures, and the instructions that multiply, by name."""
    kernel, arguments, constants = call
    made = offline.binary(kernel, arch, *arguments, **constants)
    found = re.findall(r"\b(HGMMA|QGMMA|HMMA|QMMA|UTCHMMA|UTCQMMA|v_mfma_\w+)\b", assembly(made))
    return offline.figures(made), set(found)


def arrays(dtype: str, heads: tuple[int, ...], length: int, dim: int) -> list[np.ndarray]:
    return [np.zeros((2, length, h, dim), numpy_dtype(dtype)) for h in heads]


def forward_of(dtype: str, dim: int) -> Any:
    q, k, v = arrays(dtype, (8, 2, 2), 512, dim)
    factors = np.ones((2, 2), np.float32)
    descale = Descale(2.0, factors, factors, 2, dtype, dtype)
    problem, operands = direct.prepare(q, k, v, causal=True, descale=descale)
    out = np.zeros(problem.out_shape, numpy_dtype(problem.dtype_out))
    lse = np.zeros(problem.lse_shape, np.float32)
    stats = np.zeros((2, *problem.lse_shape), np.float32)
    results = launch.Results(*(direct.view_of(x, True) for x in (out, lse, stats)))
    return lambda: launch.forward(problem, operands, results)


CASES = [
    pytest.param(arch, dtype, dim, id=f"{arch}-{dtype}-{dim}")
    for arch, dtype, dim in (
        ("sm_89", "float8_e4m3fn", 128),
        ("sm_90", "float8_e4m3fn", 128),
        ("sm_90", "float8_e5m2", 128),
        ("sm_100", "float8_e4m3fn", 128),
        ("sm_80", "float8_e4m3fn", 128),
        ("gfx942", "float8_e4m3fn", 128),
    )
    if NEW or arch in ("sm_90", "sm_80")
]
# Bytes a thread. On sm_90 the forward has two sums at once, a tile's and all tiles'.
SPILLS = {"sm_90": 48, "sm_80": 32}


@pytest.mark.parametrize(("arch", "dtype", "dim"), CASES)
def test_forward(arch: str, dtype: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, careful = launched(monkeypatch, arch, forward, "forward", forward_of(dtype, dim))
    made, names = products(plain, arch)
    if arch in NATIVE:
        assert names == {NATIVE[arch]}
    else:
        assert names
        assert all(re.fullmatch(HALF[arch], name) for name in names), names
    assert made.spilled <= SPILLS.get(arch, 0)
    # The launch behind it, which puts numbers in place of some values, multiplies float16.
    if (arch, dtype, dim) == ("sm_90", "float8_e4m3fn", 128):
        _, names = products(careful, arch)
        assert names
        assert all(re.fullmatch(HALF[arch], name) for name in names)


@pytest.mark.parametrize(
    ("arch", "queries"),
    [("sm_80", "bfloat16"), ("sm_90", "bfloat16"), ("sm_90", "float8_e4m3fn"), ("gfx942", "bfloat16")]
    if NEW
    else [("sm_90", "bfloat16")],
)
def test_over_a_cache(arch: str, queries: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (q,) = arrays(queries, (8,), 1, 128)
    pages_k, pages_v = arrays("float8_e4m3fn", (2, 2), 64, 128)
    factors = np.ones((2, 2), np.float32)
    made = describe_program(
        q.shape,
        None,
        lambda _, array: array.dtype.name,
        descale=Descale(None, factors, factors, 2, queries, "float8_e4m3fn"),
    )
    integers = Integers(seqlens=direct.view_of(np.full(2, 60)))
    call = describe_cache(
        made.program,
        *(direct.view_of(x, True) for x in (q, pages_k, pages_v)),
        integers=integers,
        tables=[direct.view_of(x) for x in made.tables],
        names=made.names,
    )
    problem = call.problem
    out = np.zeros(problem.out_shape, numpy_dtype(problem.dtype_out))
    lse, stats = (np.zeros(shape, np.float32) for shape in (problem.lse_shape, (2, *problem.lse_shape)))
    results = launch.Results(*(direct.view_of(x, True) for x in (out, lse, stats)))
    (found,) = launched(
        monkeypatch, arch, decode, "decode", lambda: launch_decode.forward(problem, call.operands, results)
    )
    figures, names = products(found, arch)
    assert names
    assert not any(name.startswith("Q") for name in names)
    assert figures.spilled <= SPILLS.get(arch, 0), figures
