"""`deterministic` of flash_attn's functions reaches the program, and a process that asks for it has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from anyflash.compat import flash_attn
from anyflash.compat import flash_attn_interface as generation3
from anyflash.compat.flash_attn import _private, _version1, cute
from anyflash.dispatch import plan as plans

Q, K, V = (torch.randn(1, 8, 2, 16, requires_grad=True) for _ in range(3))
STARTS = torch.tensor([0, 8], dtype=torch.int32)
PACKED = (STARTS, STARTS, 8, 8)
ROWS = tuple(x[0] for x in (Q, K, V))


def _private_backward(deterministic: bool) -> None:
    out, lse, _, _ = _private._flash_attn_forward(Q, K, V, 0.0, None, False, -1, -1, 0.0, None, False)
    grads = [torch.empty_like(x) for x in (Q, K, V)]
    terms = (0.0, None, False, -1, -1, 0.0, None)
    _private._flash_attn_backward(out, Q, K, V, out, lse, *grads, *terms, deterministic)


def _generation3_backward(deterministic: bool) -> None:
    out, lse, *_ = generation3._flash_attn_forward(Q, K, V)
    grads = {name: torch.empty_like(Q) for name in ("dq", "dk", "dv")}
    generation3._flash_attn_backward(out, Q, K, V, out, lse, **grads, deterministic=deterministic)


CALLS: dict[str, Callable[[bool], Any]] = {
    "2": lambda d: flash_attn.flash_attn_func(Q, K, V, deterministic=d).sum().backward(),
    "2 qkv": lambda d: (
        flash_attn.flash_attn_qkvpacked_func(torch.stack((Q, K, V), 2), deterministic=d).sum().backward()
    ),
    "2 varlen": lambda d: (
        flash_attn.flash_attn_varlen_func(*ROWS, *PACKED, deterministic=d).sum().backward()
    ),
    "2 private": _private_backward,
    "1": lambda d: (
        _version1.flash_attn_unpadded_func(*ROWS, *PACKED, 0.0, deterministic=d).sum().backward()
    ),
    "3": lambda d: generation3.flash_attn_func(Q, K, V, deterministic=d).sum().backward(),
    "3 qkv": lambda d: (
        generation3.flash_attn_qkvpacked_func(torch.stack((Q, K, V), 2), deterministic=d).sum().backward()
    ),
    "3 varlen": lambda d: (
        generation3.flash_attn_varlen_func(*ROWS, *PACKED, deterministic=d).sum().backward()
    ),
    "3 private": _generation3_backward,
    "cute": lambda d: cute.flash_attn_func(Q, K, V, deterministic=d)[0].sum().backward(),
    "cute varlen": lambda d: (
        cute.flash_attn_varlen_func(
            *ROWS, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, deterministic=d
        )[0].sum().backward()
    ),
}  # fmt: skip


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """What the programs of backward passes say."""
    said: list[bool] = []
    own = plans.execute_backward

    def noted(plan: Any, *rest: Any) -> None:
        said.append(plan.problem.program.deterministic)
        own(plan, *rest)

    monkeypatch.setattr(plans, "execute_backward", noted)
    before = torch.are_deterministic_algorithms_enabled()
    yield said
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_it_is_handed_on(name: str, asked: bool, found: list[bool]) -> None:
    CALLS[name](asked)
    assert found == [asked]


@pytest.mark.parametrize("name", CALLS)
def test_the_process_may_ask(name: str, found: list[bool]) -> None:
    torch.use_deterministic_algorithms(True)
    CALLS[name](False)
    assert found == [True]
