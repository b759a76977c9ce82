"""Which backend runs a problem: the named one, or the lowest rank that does not decline."""

from __future__ import annotations

from anyflash.backends import registry
from anyflash.backends.base import Backend
from anyflash.core.device import Device
from anyflash.core.errors import BackendBroken, InvalidCall, Unsupported
from anyflash.semantics.problem import Problem


def reasons(entry: registry.Entry, problem: Problem, device: Device) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    if entry.reason is not None:
        return [entry.reason]
    assert entry.backend is not None
    return entry.backend.decline(problem, device)


def choose(problem: Problem, device: Device, backend: str | None = None) -> Backend:
    """The backend for `problem` on `device`.

    backend     its name, which forces it; None for the preferred one

    Raises InvalidCall for an unknown name, BackendBroken for a named backend whose file fails to import, and
    Unsupported, with every reason, if nothing that may run the problem can.
    """
    entries = registry.entries()
    if backend is not None:
        return _named(entries, problem, device, backend)
    declined: dict[str, list[str]] = {}
    for entry in entries.values():
        why = reasons(entry, problem, device)
        if entry.backend is not None and entry.backend.rank is None:
            why = [*why, f'runs only if named: backend="{entry.name}"']
        if why:
            declined[entry.name] = why
            continue
        assert entry.backend is not None
        return entry.backend
    raise Unsupported(summary(problem, device), declined, _hint(device))


def _named(entries: dict[str, registry.Entry], problem: Problem, device: Device, name: str) -> Backend:
    entry = entries.get(name)
    if entry is None:
        known = ", ".join(repr(known) for known in entries)
        raise InvalidCall("backend", repr(name), f"None or one of {known}")
    if entry.backend is None:
        assert entry.error is not None
        raise BackendBroken(name, "being loaded", entry.error) from entry.error
    why = reasons(entry, problem, device)
    if why:
        raise Unsupported(
            summary(problem, device),
            {name: why},
            f'backend="{name}" asks for this one alone; leave it out to choose',
        )
    return entry.backend


def summary(problem: Problem, device: Device) -> str:
    """The problem in one line, for messages and the log."""
    q, k, v = problem.q_shape, problem.k_shape, problem.v_shape
    parts = [f"attention of q {q}, k {k}, v {v} in {problem.dtype} on {device}"]
    if problem.dtype_cache is not None:
        parts.append(f"a cache in {problem.dtype_cache}")
    if problem.addressing == "varlen":
        longest = "longest" if device.kind == "cpu" else "of at most"
        parts.append(f"{problem.batch} sequences, {longest} {problem.seqlen_q} and {problem.seqlen_k}")
    elif problem.addressing == "paged":
        parts.append(
            f"{problem.batch} sequences in a cache, longest {problem.seqlen_q} and at most {problem.seqlen_k}"
        )
    if problem.program.score:
        parts.append("with a score program")
    if problem.program.mask:
        parts.append("with a mask")
    if problem.program.dropout_p:
        parts.append(f"with dropout {problem.program.dropout_p}")
    return ", ".join(parts)


def _hint(device: Device) -> str:
    if device.kind != "cpu":
        return "Move the arrays to the CPU, or see `anyflash doctor` for what this machine can run"
    return 'backend="reference" runs every valid call on the CPU, slowly and in quadratic memory'
