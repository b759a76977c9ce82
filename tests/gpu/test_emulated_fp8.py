"""The Hopper forward of 8-bit floats under the emulator, as test_emulated_hopper.py tries the other.

What p in e4m3 costs is allowed for as for the portable kernels (contract/backends.py: WEIGHTS).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import inspect
import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import anyflash as af
from anyflash.backends.hopper import BACKEND
from anyflash.contract import direct, run
from anyflash.contract.cases import Case, Packed
from anyflash.contract.poison import Layout
from anyflash.contract.rules import MASKS, Causal, Window
from anyflash.contract.terms import SCORES, Alibi, Biases, Softcap
from anyflash.kernels.gluon import hopper, schedule_fp8
from anyflash.kernels.gluon.transpose import turn, turned_layout
from gpu import emulated
from gpu.emulator import emulate, translate, wgmma
from gpu.emulator.tensor import Tensor

LENGTHS = Packed((70, 0, 200, 3), (70, 33, 150, 0))
SPARE = Packed((130, 40), (260, 70), used_k=(190, 0), slack_q=9, slack_k=33)

CASES = (
    Case("plain", lens=(100, 300), dims=(64, 64)),
    Case("wide", lens=(70, 300), dims=(128, 128), descale="numbers"),
    Case("causal", lens=(300, 300), dims=(128, 128), descale="arrays", rules=(Causal(),)),
    Case("causal_fewer_keys", lens=(300, 70), dims=(64, 64), rules=(Causal(),), batch=1),
    Case("group", lens=(70, 260), dims=(64, 128), heads=(6, 2), descale="mixed", rules=(Causal(),), batch=1),
    Case("window", lens=(300, 330), dims=(128, 64), descale="numbers", rules=(Window(40, 9),), batch=1),
    Case("few_rows", lens=(140, 150), dims=(64, 64), rules=(MASKS["few_rows"],), batch=1),
    Case("softcap", lens=(70, 260), dims=(64, 64), terms=(Softcap(2.0), Alibi()), descale="arrays", batch=1),
    Case("bias", lens=(70, 260), dims=(64, 64), terms=(Biases(("hqk",)), SCORES["relative"]), batch=1),
    Case("softcap_wide", lens=(70, 140), dims=(128, 128), terms=(Softcap(2.0),), descale="arrays", batch=1),
    Case("sinks", lens=(70, 260), dims=(64, 64), sinks="randn", descale="numbers", batch=1),
    Case("sinks_no_key", lens=(130, 70), dims=(64, 64), sinks="randn", rules=(Causal(),), batch=1),
    Case("odd_dims", lens=(70, 140), dims=(96, 80), descale="arrays", batch=1),
    Case("latent", lens=(130, 140), dims=(192, 128), heads=(2, 1), descale="numbers", batch=1),
    Case("large", lens=(70, 260), dims=(64, 64), data="large", descale="numbers", batch=1),
    Case("packed", packed=LENGTHS, dims=(64, 64), heads=(4, 2), descale="arrays"),
    Case("packed_causal", packed=SPARE, dims=(128, 128), rules=(Causal(),), descale="mixed"),
    Case("one_query", lens=(1, 300), dims=(64, 64), heads=(4, 1), descale="arrays"),
    Case("layout_gaps", layouts=(Layout((0, 2, 1, 3), gap=16),), lens=(70, 140), dims=(64, 64), batch=1),
)  # fmt: skip
DTYPES = ("float8_e4m3fn", "float8_e5m2")
# The same kernels: the older Triton is asked for fewer.
EVERY = 1 if triton.__version__ >= "3.9" else 5


def cases() -> list[Case]:
    # Every fourth in e5m2.
    return [
        replace(case, id=f"{dtype}-{case.id}", dtype=dtype, data_seed=i)
        for i, case in enumerate(CASES)
        for dtype in (DTYPES[i % 4 == 2],)
    ][::EVERY]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_contract(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = emulated.install(monkeypatch, seed=case.data_seed)
    report = run.run(case, "hopper", directions=("forward",))
    assert not report.failures, "\n".join(report.failures)
    assert set(launched) == {"forward_fp8"}


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn) for shape in shapes]


@pytest.mark.parametrize("seed", range(6))
def test_every_schedule(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whatever the order in which things complete."""
    q, k, v = arrays((1, 200, 2, 64), (1, 330, 1, 64), (1, 330, 1, 64))
    found = []
    for this in (0, seed):
        emulated.install(monkeypatch, seed=this)
        found.append(af.attention(q, k, v, causal=True, return_lse=True, backend="hopper"))
    assert [x.tobytes() for x in found[0]] == [x.tobytes() for x in found[1]]


def test_nan_in_what_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It spoils every block, and each is computed again by the portable kernel."""
    emulated.install(monkeypatch)
    q, k, v = arrays((1, 140, 2, 64), (1, 150, 2, 64), (1, 150, 2, 64))
    call: dict[str, Any] = {"mask": lambda at: at.k != 5, "descale_v": 0.5}
    clean = af.attention(q, k, v, backend="triton", **call)
    k[0, 5] = v[0, 5] = np.nan
    assert af.attention(q, k, v, backend="hopper", **call).tobytes() == clean.tobytes()


def test_sums_of_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores keep about 14 bits of a sum. What that cuts off is of one tile, however many there are."""
    emulated.install(monkeypatch)
    monkeypatch.setattr(wgmma, "SUM_BITS", 14)
    tile, keys = schedule_fp8.forward_tiles(64, 64, False).block_n, 3072
    q = np.zeros((1, 130, 1, 64), ml_dtypes.float8_e4m3fn)
    v = np.exp2(np.random.default_rng(0).uniform(-5, 1, (1, keys, 1, 64))).astype(ml_dtypes.float8_e4m3fn)
    out = af.attention(q, v, v, backend="hopper").astype(np.float64)
    values = torch.from_numpy(v[0, :, 0].astype(np.float64))
    wanted = values.mean(0).numpy()
    # Each of 32 products and the sum before them loses less than a unit of the last bit of the greatest.
    lost = tile / 32 * 33 * 2.0**-13 + float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) / 2
    in_one = wgmma.summed(torch.full((1, keys), 256.0, dtype=torch.float64), values, 0.0, 14)
    assert np.abs(out / wanted - 1).max() <= lost
    assert np.abs(in_one.numpy() / (256 * keys) / wanted - 1).max() > lost


@pytest.mark.parametrize("case", cases()[:2], ids=lambda case: case.id)
def test_contract_with_sums_of_few_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """lse shows what tensor cores cut off, and may."""
    emulated.install(monkeypatch)
    monkeypatch.setattr(wgmma, "SUM_BITS", 14)
    refused = run.run(case, "hopper", directions=("forward",))
    assert refused.failures and all("lse" in said for said in refused.failures)
    monkeypatch.setattr(run, "sum_bits", lambda backend: 14)
    report = run.run(case, "hopper", directions=("forward",))
    assert not report.failures, "\n".join(report.failures)


@pytest.mark.parametrize(("keys", "dim"), [(128, 128), (128, 64), (64, 128), (64, 64)])
def test_turned(keys: int, dim: int) -> None:
    """Every byte of v comes to its column's row, at the place of its key."""
    given = torch.arange(keys * dim, dtype=torch.int32).to(torch.uint8).view(torch.int8).reshape(keys, dim)
    found = torch.zeros(dim, keys, dtype=torch.int8)
    emulate(turned_alone, (1,), given, found, keys, dim)
    key = np.arange(keys)
    place = key & ~15 | (key & 6) << 1 | (key & 8) >> 2 | key & 1
    np.testing.assert_array_equal(found.numpy()[:, place], given.numpy().T)


@gluon.jit
def turned_alone(given, found, KEYS: gl.constexpr, DIM: gl.constexpr):
    ROWS: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    TILE: gl.constexpr = turned_layout(DIM)
    TURNED: gl.constexpr = turned_layout(KEYS)
    tile = gl.allocate_shared_memory(gl.int8, [KEYS, DIM], TILE)
    turned = gl.allocate_shared_memory(gl.int8, [DIM, KEYS], TURNED)
    row = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(1, ROWS)), 1)
    column = gl.expand_dims(gl.arange(0, DIM, layout=gl.SliceLayout(0, ROWS)), 0)
    tile.store(gl.load(given + row * DIM + column))
    turn(tile, turned, KEYS, DIM)
    row = gl.expand_dims(gl.arange(0, DIM, layout=gl.SliceLayout(1, ROWS)), 1)
    column = gl.expand_dims(gl.arange(0, KEYS, layout=gl.SliceLayout(0, ROWS)), 0)
    gl.store(found + row * KEYS + column, turned.load(ROWS))


def test_byte_permutations() -> None:
    """What the instructions of `byte_planes` do to two registers is what the emulator puts in their place."""
    low, high = (torch.arange(4, dtype=torch.uint8) + first for first in (10, 20))
    both = torch.cat((low, high)).tolist()
    found = [
        [both[int(digit, 16)] for digit in reversed(selector)]
        for selector in re.findall(
            r"prmt\.b32 \$\d, \$2, \$3, 0x(\w{4});", inspect.getsource(hopper.byte_planes.fn)
        )
    ]
    pairs = [Tensor(x.view(torch.int16).view(1, 2)) for x in (low, high)]
    wanted = [plane.data.view(torch.uint8).flatten().tolist() for plane in translate.byte_planes(*pairs)]
    assert found == wanted == [[10, 12, 20, 22], [11, 13, 21, 23]]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, False),
        ("score", True),
        ("(mul (mul score (load 0:f head)) (load 1:f batch (floordiv head 4)))", True),
        ("(mul (load 0:f head) score)", True),
        ("(mul score (load 0:f k))", False),
        ("(add score (load 0:f head))", False),
        ("(mul score score)", False),
        ("(tanh (mul score (load 0:f head)))", False),
    ],
)
def test_what_only_scales(text: str | None, wanted: bool) -> None:
    assert schedule_fp8.only_scales(text) is wanted


def test_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    q, k, v = arrays((1, 70, 2, 96), (1, 140, 1, 96), (1, 140, 1, 96))
    said = str(af.explain(q, k, v, causal=True, backend="hopper"))
    tiles = schedule_fp8.forward_tiles(96, 96, False)
    assert f"{tiles.block_m} x {tiles.block_n}, 2 consumers, {tiles.stages} stages" in said
    assert "p in e4m3" in said


DECLINED = (
    ({"dim": 136}, "v of 8-bit floats has at most 128 columns"),
    ({"dropout_p": 0.1}, "has no dropout for 8-bit floats"),
)


@pytest.mark.parametrize(("call", "why"), DECLINED)
def test_declines(call: dict[str, Any], why: str) -> None:
    keywords = dict(call)
    dim = keywords.pop("dim", 64)
    q, k = arrays((1, 4, 1, dim), (1, 4, 1, dim))
    problem, _ = direct.prepare(q, k, k, **keywords)
    assert any(why in reason for reason in BACKEND.lacks(problem))
