"""Rows without a system, for the machinery around them: they go right, wrong, missing, and down."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable

import numpy as np

from anyflash.adoption.row import Reach, Requirement, Result, Role, Row, Variant, Workload

HERE = Requirement("numpy", "pip install numpy")
NOWHERE = Requirement("no-such-distribution", "pip install no-such-distribution")
MIB = {"eager": 64, "best": 32, "ours": 16}
SECONDS = {"eager": 0.03, "best": 0.02, "ours": 0.01}


def workload(ours: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Workload:
    exact = np.linspace(1.0, 2.0, 1000)

    def step(role: Role) -> Result:
        held = np.ones(MIB[role] << 17)
        time.sleep(SECONDS[role])
        found = exact.astype(np.float32)
        return Result({"x": ours(found) if role == "ours" else found, "held": held[:1]}, {"dx": found})

    def reference() -> Result:
        return Result({"x": exact, "held": np.ones(1)}, {"dx": exact})

    variants = tuple(Variant(role, f"the {role}", contextlib.nullcontext) for role in SECONDS)
    return Workload("numbers", "float32", step, reference, variants)


def fails(quick: bool) -> Workload:
    raise OSError("the model file is gone")


def dies(quick: bool) -> Workload:
    os.write(1, b"last words\n")
    os.abort()


def trains(curves: dict[Role, list[float]]) -> Callable[[bool], Workload]:
    return lambda quick: dataclasses.replace(workload(), train=lambda role, steps: curves[role][:steps])


def reaches(quick: bool) -> Workload:
    """A step of size n holds n times the role's MIB."""

    def prepare(role: Role, size: int) -> Callable[[], object]:
        return lambda: np.ones(size * MIB[role] << 17)

    return dataclasses.replace(workload(), reach=Reach("things", 100 << 20, range(1, 5), prepare))


FALLING = [4.0 - 0.25 * i for i in range(8)]
NEAR = [loss + 0.01 for loss in FALLING]

ROWS = [
    Row("learns", "Stub", "trains", (HERE,), trains({"eager": FALLING, "best": FALLING, "ours": NEAR})),
    Row(
        "parts",
        "Stub",
        "trains otherwise",
        (HERE,),
        trains({"eager": FALLING, "best": FALLING, "ours": FALLING[:7] + [2.5]}),
    ),
    Row("stays", "Stub", "learns nothing", (HERE,), trains(dict.fromkeys(SECONDS, [4.0] * 8))),
    Row(
        "diverges",
        "Stub",
        "is not a number",
        (HERE,),
        trains({"eager": FALLING, "best": FALLING, "ours": [float("nan")] * 8}),
    ),
    Row("reaches", "Stub", "grows", (HERE,), reaches),
    Row("right", "Stub", "goes right", (HERE,), lambda quick: workload()),
    Row("wrong", "Stub", "differs", (HERE,), lambda quick: workload(lambda x: x * 1.001)),
    Row("fails", "Stub", "cannot be built", (HERE,), fails),
    Row("dies", "Stub", "takes its process down", (HERE,), dies),
    Row("absent", "Stub", "is not installed", (HERE, NOWHERE), fails),
]
