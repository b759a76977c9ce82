"""Backends are found, chosen, named and blamed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anyflash as af
import anyflash.backends
from anyflash.backends import registry
from anyflash.backends.registry import Entry
from anyflash.core.device import CPU, Device
from anyflash.core.errors import BackendBroken, InvalidCall, Unsupported
from anyflash.dispatch import plan
from anyflash.dispatch.choose import choose
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem, Program

Q = np.ones((1, 3, 2, 4), np.float32)
PROBLEM = Problem(Program(), "float32", 1, 2, 2, 3, 3, 4, 4)


@dataclass
class Fake:
    """A backend that writes ones and counts."""

    name: str
    rank: int | None = 0
    missing: str | None = None
    declines: list[str] = field(default_factory=list)
    fails: Exception | None = None
    configured: int = 0
    accepts: str = "memory"

    def available(self) -> str | None:
        return self.missing

    def decline(self, problem: Problem, device: Device) -> list[str]:
        return self.declines

    def configure(self, problem: Problem) -> str:
        self.configured += 1
        return "config"

    def forward(self, problem: Problem, config: Any, operands: Operands, results: Results) -> None:
        if self.fails is not None:
            raise self.fails
        for view in (results.out, results.lse, results.stats):
            as_numpy(view)[...] = 1

    def backward(
        self, problem: Problem, config: Any, operands: Operands, saved: Saved, grads: Gradients
    ) -> None:
        for view in (grads.dq, grads.dk, grads.dv):
            as_numpy(view)[...] = 1

    def explain(self, problem: Problem, config: Any) -> dict[str, Any]:
        return {}


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Fake]]:
    """Put fakes in place of the folder's backends."""

    def put(*fakes: Fake, broken: dict[str, Exception] | None = None) -> dict[str, Fake]:
        entries = [Entry(fake.name, fake) for fake in fakes]
        entries += [Entry(name, None, error) for name, error in (broken or {}).items()]
        ordered = {entry.name: entry for entry in sorted(entries, key=registry._preference)}
        monkeypatch.setattr(registry, "entries", lambda: ordered)
        monkeypatch.setattr(plan, "_plans", {})
        return {fake.name: fake for fake in fakes}

    return put


def test_folder_is_the_table() -> None:
    files = {path.stem for path in Path(anyflash.backends.__path__[0]).glob("*.py")}
    assert set(registry.entries()) == files - {"__init__", "base", "registry"}
    assert registry.entries()["reference"].reason is None


def test_broken_file_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "absent.py").write_text("import a_library_that_nobody_has\n")
    (tmp_path / "misnamed.py").write_text("class B:\n    name = 'other'\n    rank = 1\nBACKEND = B()\n")
    (tmp_path / "empty.py").write_text("")
    monkeypatch.setattr(anyflash.backends, "__path__", [*anyflash.backends.__path__, str(tmp_path)])
    registry.entries.cache_clear()
    try:
        entries = registry.entries()
        assert {name: entries[name].reason for name in ("absent", "misnamed", "empty")} == {
            "absent": "cannot be loaded: ModuleNotFoundError: No module named 'a_library_that_nobody_has'",
            "misnamed": "cannot be loaded: ValueError: the backend in misnamed.py calls itself 'other'",
            "empty": "cannot be loaded: AttributeError: "
            "module 'anyflash.backends.empty' has no attribute 'BACKEND'",
        }
        assert "backend absent cannot be loaded: ModuleNotFoundError" in caplog.text
        with pytest.raises(BackendBroken, match="a_library_that_nobody_has") as caught:
            af.attention(Q, Q, Q, backend="absent")
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    finally:
        registry.entries.cache_clear()


@dataclass(frozen=True)
class Choice:
    id: str
    fakes: tuple[Fake, ...]
    named: str | None
    expected: str


CHOICES = (
    Choice("lowest rank", (Fake("b", 2), Fake("a", 1), Fake("c", 3)), None, "a"),
    Choice("ties by name", (Fake("b", 1), Fake("a", 1)), None, "a"),
    Choice("declined", (Fake("a", 1, declines=["no"]), Fake("b", 2)), None, "b"),
    Choice("absent", (Fake("a", 1, missing="no driver"), Fake("b", 2)), None, "b"),
    Choice("named beats rank", (Fake("a", 1), Fake("b", 2)), "b", "b"),
    Choice("named without rank", (Fake("a", 1), Fake("b", None)), "b", "b"),
)


@pytest.mark.parametrize("case", CHOICES, ids=lambda case: case.id)
def test_choice(case: Choice, backends: Any) -> None:
    backends(*case.fakes)
    assert choose(PROBLEM, CPU, case.named).name == case.expected


def test_nothing_can(backends: Any) -> None:
    backends(
        Fake("a", 1, declines=["head_dim 4", "float32"]),
        Fake("slow", None),
        broken={"b": OSError("libfoo")},
    )
    with pytest.raises(Unsupported) as caught:
        choose(PROBLEM, CPU)
    assert caught.value.reasons == {
        "a": ("head_dim 4", "float32"),
        "b": ("cannot be loaded: OSError: libfoo",),
        "slow": ('runs only if named: backend="slow"',),
    }
    assert str(caught.value) == (
        "no backend can run attention of q (1, 3, 2, 4), k (1, 3, 2, 4), v (1, 3, 2, 4) in float32 on cpu\n"
        "  a: head_dim 4; float32\n"
        "  b: cannot be loaded: OSError: libfoo\n"
        '  slow: runs only if named: backend="slow"\n'
        'backend="reference" runs every valid call on the CPU, slowly and in quadratic memory'
    )


def test_named_is_forced(backends: Any) -> None:
    backends(Fake("a", 1), Fake("b", 2, declines=["no float32"]), Fake("c", 3, missing="no driver"))
    for name, why in (("b", "no float32"), ("c", "no driver")):
        with pytest.raises(Unsupported) as caught:
            choose(PROBLEM, CPU, name)
        assert caught.value.reasons == {name: (why,)}
    with pytest.raises(InvalidCall):
        choose(PROBLEM, CPU, "z")


def test_failure_is_the_backends(backends: Any) -> None:
    backends(Fake("a", fails=ZeroDivisionError("a bug")))
    with pytest.raises(BackendBroken, match="backend a failed while running forward: a bug") as caught:
        af.attention(Q, Q, Q)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_our_errors_pass(backends: Any) -> None:
    backends(Fake("a", fails=Unsupported("that", {"a": ["no"]})))
    with pytest.raises(Unsupported):
        af.attention(Q, Q, Q)


def test_configured_once_a_problem(backends: Any) -> None:
    fake = backends(Fake("a"))["a"]
    for _ in range(3):
        af.attention(Q, Q, Q)
        af.attention(Q, Q, Q, causal=True)
    assert fake.configured == 2
    plan.forget()
    af.attention(Q, Q, Q)
    assert fake.configured == 3


def test_reference_refuses_other_devices() -> None:
    with pytest.raises(Unsupported, match="cuda:1"):
        choose(PROBLEM, Device("cuda", 1), "reference")


def test_log_names_the_call_before_it_runs(backends: Any, caplog: pytest.LogCaptureFixture) -> None:
    backends(Fake("a", fails=ZeroDivisionError("a bug")))
    with caplog.at_level(logging.DEBUG, "anyflash"), pytest.raises(BackendBroken):
        af.attention(Q, Q, Q)
    planned, called = caplog.messages
    assert planned == (
        "plan: a runs attention of q (1, 3, 2, 4), k (1, 3, 2, 4), v (1, 3, 2, 4) in float32 on cpu, "
        "config config"
    )
    assert called.startswith("forward on a: Problem(")
