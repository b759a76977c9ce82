"""A plan is a backend with its configuration for one Problem on one device; made once, then looked up."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from anyflash.backends.base import Backend
from anyflash.core.device import Device
from anyflash.core.errors import AnyflashError, BackendBroken
from anyflash.core.log import logger
from anyflash.core.view import View
from anyflash.dispatch.choose import choose, summary
from anyflash.semantics.cache import CacheCall
from anyflash.semantics.describe import check_backward, check_forward
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem

_MAX_KEPT = 4096
_plans: dict[tuple[Problem, Device, str | None], Plan] = {}


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs `problem`."""

    problem: Problem
    device: Device
    backend: Backend
    config: Any


def plan(problem: Problem, device: Device, backend: str | None = None) -> Plan:
    """The plan for `problem`, from the table or made now. Raises as `choose` does."""
    key = (problem, device, backend)
    found = _plans.get(key)
    if found is None:
        chosen = choose(problem, device, backend)
        config = guard(chosen, "configuring", chosen.configure, problem)
        found = Plan(problem, device, chosen, config)
        logger.info("plan: %s runs %s, config %s", chosen.name, summary(problem, device), config)
        if len(_plans) >= _MAX_KEPT:
            _plans.clear()
        _plans[key] = found
    return found


def forget() -> None:
    """Drop all plans, for after a setting changed."""
    _plans.clear()


def run_forward(problem: Problem, operands: Operands, results: Results, backend: str | None = None) -> None:
    """Write the forward of `problem` into `results`. Raises InvalidCall before anything is written if they do
    not fit, and as `choose` does."""
    made = plan(problem, operands.q.device, backend)
    check_forward(problem, results)
    execute_forward(made, operands, results)


def run_backward(
    problem: Problem, operands: Operands, saved: Saved, grads: Gradients, backend: str | None = None
) -> None:
    """Write the backward of `problem` into `grads`. Raises as `run_forward` does."""
    execute_backward(plan(problem, operands.q.device, backend), operands, saved, grads)


def restate(problem: Problem, device: Device, lse: View, stats: View, backend: str | None = None) -> None:
    """Write what the backward of `problem` reads as `stats`, from an lse alone; see `Backend.restate`."""
    made = plan(problem, device, backend)
    guard(made.backend, "restating lse", made.backend.restate, made.problem, made.config, lse, stats)


def execute_forward(made: Plan, operands: Operands, results: Results) -> None:
    """Run a plan forward into results that fit it."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("forward on %s: %r %r", made.backend.name, made.problem, operands)
    guard(made.backend, "running forward", made.backend.forward, made.problem, made.config, operands, results)


def execute_append(made: Plan, call: CacheCall, turned: View | None) -> Operands:
    """Write what is new into a cache; see `Backend.append`."""
    return guard(made.backend, "appending", made.backend.append, made.problem, made.config, call, turned)


def execute_backward(made: Plan, operands: Operands, saved: Saved, grads: Gradients) -> None:
    """Run a plan backward."""
    check_backward(made.problem, saved, grads)
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("backward on %s: %r %r %r", made.backend.name, made.problem, operands, saved)
    guard(
        made.backend,
        "running backward",
        made.backend.backward,
        made.problem,
        made.config,
        operands,
        saved,
        grads,
    )


def guard(backend: Backend, doing: str, function: Any, *args: Any) -> Any:
    """Call a backend; what it fails with is told as the backend's failure, with the cause chained."""
    try:
        return function(*args)
    except (AnyflashError, MemoryError):
        raise
    except Exception as cause:
        raise BackendBroken(backend.name, doing, cause) from cause
