"""What a call would do, without doing it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from anyflash.backends import registry
from anyflash.core.device import Device
from anyflash.core.errors import InvalidCall
from anyflash.dispatch.choose import reasons, summary
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Problem


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer of `anyflash.explain`; prints as a report.

    backend     the one that would run, None if none can
    config      its configuration
    facts       what it says of itself: tile sizes, instruction set, threads, scratch bytes
    declined    each other backend's reasons
    """

    problem: Problem
    device: Device
    backend: str | None
    config: Any = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    declined: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def __str__(self) -> str:
        lines = [summary(self.problem, self.device)]
        lines.append(f"  backend     {self.backend or 'none can run it'}")
        if self.config is not None:
            lines.append(f"  config      {self.config}")
        lines += [f"  {name:<11} {value}" for name, value in self.facts.items()]
        lines += [f"  not {name:<7} {'; '.join(why)}" for name, why in self.declined.items()]
        return "\n".join(lines)


def explain(problem: Problem, operands: Operands, backend: str | None = None) -> Explanation:
    """Describe the plan for a call. An unknown backend raises InvalidCall; refusals are in the answer."""
    device, entries = operands.q.device, registry.entries()
    if backend is not None and backend not in entries:
        raise InvalidCall("backend", repr(backend), f"None or one of {', '.join(map(repr, entries))}")
    declined: dict[str, list[str]] = {}
    chosen: registry.Backend | None = None
    for name, entry in entries.items():
        why = reasons(entry, problem, device)
        if backend is not None and name != backend:
            why = [*why, f'the call asks for backend="{backend}"']
        elif backend is None and entry.backend is not None and entry.backend.rank is None:
            why = [*why, f'runs only if named: backend="{name}"']
        elif not why and chosen is not None:
            why = [f"{chosen.name} is preferred"]
        if why:
            declined[name] = why
        else:
            chosen = entry.backend
    if chosen is None:
        return Explanation(problem, device, None, declined=declined)
    config = chosen.configure(problem)
    return Explanation(problem, device, chosen.name, config, chosen.explain(problem, config), declined)
