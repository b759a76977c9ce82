"""What is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from anyflash.bench import inputs, measure, ours, timing, truth
from anyflash.bench.agreement import PEER_SLACK, Expected, judge
from anyflash.bench.inputs import Inputs, Results
from anyflash.bench.peers.base import Step
from bench import tiny

DTYPES = ("float32", "bfloat16", "float16")


def expected(made: Inputs) -> Expected:
    cell = made.cell
    plain = truth.attention(made, truth.plain(cell.dtype))
    return Expected(truth.attention(made, truth.EXACT), plain, max(cell.seqlen_q, cell.seqlen_k))


def results(made: Inputs) -> Results:
    step = ours.prepare(made)
    return step.results(step.call())


def one_key_too_many(made: Inputs) -> Results:
    """Each query sees the key after it."""
    later = replace(made, k=made.k.roll(-1, 2), v=made.v.roll(-1, 2))
    return results(later) | {name: x for name, x in results(made).items() if name != "out"}


def wrong_scale(made: Inputs) -> Results:
    return results(replace(made, q=(made.q.detach() * 1.1).requires_grad_()))


def without(name: str) -> Callable[[Inputs], Results]:
    return lambda made: {key: x for key, x in results(made).items() if key != name}


def scaled(name: str, factor: float) -> Callable[[Inputs], Results]:
    return lambda made: {key: x * factor if key == name else x for key, x in results(made).items()}


def one_element(name: str, value: float) -> Callable[[Inputs], Results]:
    def change(made: Inputs) -> Results:
        found = {key: x.clone() for key, x in results(made).items()}
        found[name][0, 0, 0, 5] = value
        return found

    return change


def transposed(made: Inputs) -> Results:
    found = results(made)
    return found | {"out": found["out"].transpose(1, 2)}


BROKEN: dict[str, Callable[[Inputs], Results]] = {
    "one key too many": one_key_too_many,
    "scale 10 % too great": wrong_scale,
    "a gradient is missing": without("dk"),
    "a gradient is zero": scaled("dv", 0.0),
    "a gradient is 1 / log2(e) too small": scaled("dq", 0.6931),
    "an output is NaN": one_element("out", float("nan")),
    "an output is infinite": one_element("out", float("inf")),
    "a single gradient is off": one_element("dk", 5.0),
    "heads and rows exchanged": transposed,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["full", "causal"])
def test_the_right_result_is_admitted(variant: str, dtype: str) -> None:
    made = inputs.make(tiny.cell(variant, dtype, backward=True))
    verdict = judge(results(made), expected(made))
    assert verdict.agrees, verdict


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_one_is_refused_even_of_a_peer(broken: str, dtype: str) -> None:
    made = inputs.make(tiny.cell("causal", dtype, backward=True))
    verdict = judge(BROKEN[broken](made), expected(made), PEER_SLACK)
    assert not verdict.agrees, verdict
    assert verdict.complaint


def test_narrow_arithmetic_is_refused_in_a_wide_dtype() -> None:
    """float32 results that were computed in bfloat16 are close, and not close enough."""
    made = inputs.make(tiny.cell("causal", "float32"))
    narrow = truth.attention(made, truth.plain("bfloat16"))
    assert not judge(narrow, expected(made), PEER_SLACK).agrees


@pytest.mark.parametrize("backward", [False, True])
def test_our_broken_kernel_is_not_timed(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = ours.prepare

    def broken(made: Inputs) -> Step:
        step = prepare(made)
        return replace(step, results=lambda raw: {k: 1.01 * x for k, x in step.results(raw).items()})

    def never(*_: object) -> None:
        raise AssertionError("a refused result was timed")

    monkeypatch.setattr(ours, "prepare", broken)
    monkeypatch.setattr(timing, "interleave", never)
    record = measure.measure(tiny.cell(backward=backward), tiny.EFFORT, 1, ())
    assert record["status"] == "disagrees"
    assert "allowed" in record["why"]
    assert "seconds" not in record["ours"]


def test_our_exception_is_a_failed_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(made: Inputs) -> Step:
        raise RuntimeError("no such luck\nmore of it")

    monkeypatch.setattr(ours, "prepare", raises)
    record = measure.measure(tiny.cell(), tiny.EFFORT, 1, ())
    assert (record["status"], record["why"]) == ("failed", "RuntimeError: no such luck")


def test_dropout_is_held_to_its_own_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = tiny.cell("dropout", backward=True)
    assert measure.measure(cell, tiny.EFFORT, 1, ())["status"] == "ok"
    monkeypatch.setattr(ours, "kept", lambda made: torch.ones((2, 4, 48, 48), dtype=torch.bool))
    assert measure.measure(cell, tiny.EFFORT, 1, ())["status"] == "disagrees"
