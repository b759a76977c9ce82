"""How float32 is multiplied: by the setting, torch's flags and the device, down to the kernel's constant."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import numpy as np
import torch

import anyflash as af
from anyflash.contract import direct
from anyflash.contract.arithmetic import plain
from anyflash.contract.backends import multiplies_tf32
from anyflash.contract.cases import Case
from anyflash.contract.run import known
from anyflash.kernels.triton import backward, forward, schedule
from anyflash.kernels.triton.precision import float32_products

MATMUL = torch.backends.cuda.matmul


def by_old_name(value: bool) -> None:
    MATMUL.allow_tf32 = value


def by_new_name(value: str) -> None:
    MATMUL.fp32_precision = value


def for_all(value: str) -> None:
    MATMUL.fp32_precision = "none"
    torch.backends.fp32_precision = value


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    kept = MATMUL.fp32_precision, torch.backends.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision, torch.backends.fp32_precision = kept


# The setting, what torch is told, the device -> products.
TABLE: list[tuple[str | None, Callable[[], object], str, str]] = [
    (None, lambda: None, "sm_90", "ieee"),
    (None, lambda: by_old_name(True), "sm_90", "tf32"),
    (None, lambda: by_old_name(False), "sm_90", "ieee"),
    (None, lambda: by_new_name("tf32"), "sm_90", "tf32"),
    (None, lambda: by_new_name("ieee"), "sm_90", "ieee"),
    (None, lambda: for_all("tf32"), "sm_90", "tf32"),
    (None, lambda: torch.set_float32_matmul_precision("high"), "sm_80", "tf32"),
    (None, lambda: torch.set_float32_matmul_precision("medium"), "sm_80", "tf32"),
    (None, lambda: torch.set_float32_matmul_precision("highest"), "sm_80", "ieee"),
    ("tf32", lambda: None, "sm_90", "tf32"),
    ("tf32", lambda: by_new_name("ieee"), "sm_90", "tf32"),
    ("ieee", lambda: by_old_name(True), "sm_90", "ieee"),
    ("ieee", lambda: by_new_name("tf32"), "sm_90", "ieee"),
    ("tf32", lambda: None, "gfx90a", "ieee"),
    ("tf32", lambda: None, "gfx942", "tf32"),
    (None, lambda: by_new_name("tf32"), "gfx90a", "ieee"),
]


def table_id(value: object) -> str | None:
    return value if isinstance(value, str) else "unset" if value is None else "torch"


@pytest.mark.parametrize(("setting", "tell", "arch", "products"), TABLE, ids=table_id)
def test_choice(
    setting: str | None, tell: Callable[[], object], arch: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is None:
        monkeypatch.delenv("ANYFLASH_FLOAT32", raising=False)
    else:
        monkeypatch.setenv("ANYFLASH_FLOAT32", setting)
    tell()
    assert float32_products(arch, 256).products == products


def test_wide_heads_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLASH_FLOAT32", "tf32")
    assert float32_products("sm_90", 256).products == "tf32"
    assert float32_products("sm_90", 257) == ("ieee", "tf32 serves heads of up to 256 columns")


@pytest.mark.parametrize(("arch", "refused"), [("sm_80", False), ("sm_89", True), ("gfx942", False)])
def test_wide_heads_where_shared_memory_is_small(arch: str, refused: bool) -> None:
    for part in schedule.PARTS:
        tiles = schedule.tiles(part, arch, 576, 576, 4)
        why = schedule.too_small(tiles, part, arch, 576, 576, 4)
        assert (why is not None) is (refused and part != "forward")


def test_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLASH_FLOAT32", "fp16")
    with pytest.raises(ValueError, match="ANYFLASH_FLOAT32='fp16': expected ieee or tf32"):
        float32_products("sm_90", 64)


class Noting:
    """A kernel that notes how it was told to multiply."""

    def __init__(self, kernel: Any, noted: list[str]) -> None:
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.noted.append(constants["PRECISION"])
            return self.kernel[grid](*arguments, **constants)

        return launch


@pytest.mark.parametrize(
    ("setting", "dtype", "products"),
    [("tf32", np.float32, "tf32"), ("ieee", np.float32, "ieee"), ("tf32", np.float16, "ieee")],
)
def test_what_reaches_the_kernels(
    setting: str, dtype: Any, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str] = []
    monkeypatch.setenv("ANYFLASH_FLOAT32", setting)
    for module, name in ((forward, "forward"), (backward, "backward_dkv"), (backward, "backward_dq")):
        monkeypatch.setattr(module, name, Noting(getattr(module, name), noted))
    x = np.ones((1, 16, 1, 16), dtype)
    direct.attend("triton", x, x, x, dout=x)
    assert noted == [products] * 3


def test_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones((1, 16, 1, 16), np.float32)
    monkeypatch.setenv("ANYFLASH_FLOAT32", "tf32")
    assert "tf32, by ANYFLASH_FLOAT32" in str(af.explain(x, x, x, backend="triton"))
    monkeypatch.delenv("ANYFLASH_FLOAT32")
    assert "ieee, by torch.backends.cuda" in str(af.explain(x, x, x, backend="triton"))
    assert "float32 products" not in str(af.explain(*[x.astype(np.float16)] * 3, backend="triton"))


def test_tolerance_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What plain attention errs in tf32 is more than in float32, by about the 13 bits that factors lose."""
    case = Case("plain")
    monkeypatch.setenv("ANYFLASH_FLOAT32", "tf32")
    assert multiplies_tf32("triton", "float32")
    assert not multiplies_tf32("triton", "bfloat16")
    assert not multiplies_tf32("cpu", "float32")
    errors = {}
    for tf32 in (False, True):
        truth = known(case, tf32)[1]
        errors[tf32] = max(np.abs(found - truth.exact["out"]).max() for found in truth.plain["out"])
    assert 2**8 < errors[True] / errors[False] < 2**16


def test_factors_of_tf32() -> None:
    rounded, cut = plain("float32", True)[:2]
    half = np.float32(1 + 2**-11 + 2**-20)
    assert rounded.factor(np.array([half]))[0] == np.float32(1 + 2**-10)
    assert cut.factor(np.array([half]))[0] == 1
    special = np.array([np.inf, -np.inf, np.nan, 0], np.float32)
    np.testing.assert_array_equal(rounded.factor(special), special)
    assert not any(a.tf32 for a in plain("bfloat16", True))
