"""benchmarks/gpu_report.py in its dry mode: the plumbing of every part, on tiny shapes, interpreted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)
pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_report
from anyflash.kernels.gluon import assembler
from gpu import emulated
from gpureport import correctness, decode, markdown
from gpureport.place import Clock, Place

# Left out: what compiles (`warm`), what takes long here (`contract`), and what there is on a Hopper alone,
# which the emulator runs.
PARTS = ("ceilings", "triton", "caches", "graphs", "eight bits", "grid", "decode", "checkers", "ptxas")

HOPPER_PARTS = "hopper,caches,graphs,eight bits,grid,decode,sweep,contract"


def run(out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(out), "--dry", *arguments])
    status = gpu_report.main()
    return status, json.loads((out / "gpu.json").read_text())


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = run(tmp_path, monkeypatch, "--parts", ",".join(PARTS))
    assert not found["errors"], "\n".join(found["errors"].values())
    assert status == 0
    assert set(PARTS) <= found["seconds"].keys()
    for part in ("triton", "caches", "graphs", "eight bits"):
        judged = [case["right"] for case in found[part].values()]
        assert judged and all(judged), (part, found[part])
    assert all(not cell["failed"] for cell in found["grid"].values())
    assert {"triton", "math"} <= next(iter(found["grid"].values()))["milliseconds"]["backward"].keys()
    assert all(run["status"] == 0 for run in found["checkers"].values() if "status" in run)
    page = (tmp_path / "gpu.md").read_text()
    assert "times mean nothing" in page
    assert "## triton: 3 of 3 right" in page


def test_hopper_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = emulated.install(monkeypatch)
    monkeypatch.setattr(gpu_report, "present", lambda: ("hopper",))
    status, found = run(tmp_path, monkeypatch, "--parts", HOPPER_PARTS)
    assert status == 0, "\n".join(found["errors"].values())
    for part in ("hopper", "caches", "graphs", "eight bits"):
        assert all(case["right"] for case in found[part].values()), (part, found[part])
    speed = [cell["milliseconds"] for cell in found["grid"].values()]
    assert all(one["backward"].keys() == {"hopper", "hopper, any order", "math"} for one in speed), found[
        "grid"
    ]
    assert found["contract"]["cases on hopper"]["ran"] == 2 and len(found["contract"]) == 1
    assert len(found["sweep"]) > 2
    assert all("TFLOP/s" in variant for variant in found["sweep"].values()), found["sweep"]
    assert {"forward", "forward_fp8", "backward", "backward_dq", "decode"} <= set(launched)


def test_one_cell_by_another_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emulated.install(monkeypatch)
    monkeypatch.setattr(assembler, "doubtful", lambda: "not trusted")
    assert gpu_report.one(Place(dry=True, quick=True), "hopper") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["causal cases"] > 0 and not found["wrong"]
    assert found["TFLOP/s"]["backward"]


def test_a_part_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(place: Place) -> None:
        raise RuntimeError("as if the device were lost")

    monkeypatch.setattr(gpu_report, "ceilings", broken)
    status, found = run(tmp_path, monkeypatch, "--parts", "ceilings,ptxas")
    assert status == 1
    assert "as if the device were lost" in found["errors"]["ceilings"]
    assert "versions" in found["ptxas"]
    assert "## ceilings failed" in (tmp_path / "gpu.md").read_text()


def test_a_wrong_kernel_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is off, and one that is not the same twice."""
    place = Place(dry=True, quick=True)
    case = correctness.cases(place, "triton")[1]
    own = correctness.make
    for spoil in (lambda out, n: out.mul_(1.01), lambda out, n: out.view(-1)[0].add_(1e-6 * n)):
        made = own(case, "cpu")
        calls = [0]

        def forward(results: Any, call: Any = made.call, spoil: Any = spoil, calls: Any = calls) -> Any:
            found = type(call).forward(call, results)
            calls[0] += 1
            spoil(found[0], calls[0])
            return found

        monkeypatch.setattr(made.call, "forward", forward)
        monkeypatch.setattr(correctness, "make", lambda case, device, made=made: made)
        assert not correctness.check(case, place)["right"]


def test_time_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(100.0, {"first": 1.0, "second": 3.0})
    assert clock.left("first") == pytest.approx(25, abs=1)
    assert clock.left("second") == pytest.approx(100, abs=1)
    spent, skipped = Clock(0.0, {"first": 1.0}), list[str]()
    assert not list(spent.while_time("first", [1, 2], skipped))
    assert skipped == ["1", "2"]


def test_unused_slots_hold_nan() -> None:
    """What a cache's definition does not read would show."""
    import torch

    case = decode.Decoding(30, 2, 1, 16, 1, 16)
    lengths = torch.tensor([30, 7])
    _, cache = decode.made(case, "cpu", lengths)
    held = torch.isnan(cache.k).any(-1).any(-1)
    assert int((~held).sum()) == 37


def test_goals() -> None:
    place = Place(dry=False, quick=False)
    names = {gpu_report.grid.cell_name(case) for case in gpu_report.grid.cells(place)}
    assert all(goals.keys() <= names for goals in markdown.GOALS.values())
    backward = {"hopper": 500.0, "hopper, any order": 615.0}
    speed = {"forward": {"hopper": 347.5, "cudnn": 695.0}, "backward": backward}
    page = markdown.markdown({"machine": {}, "grid": {"128 8192 full": {"TFLOP/s": speed}}})
    assert "| forward 128 8192 full | 348 | 695 | 50% | 0.50 |" in page
    assert "| backward 128 8192 full | 615 | 600 | reached | - |" in page


def test_page_of_nothing() -> None:
    assert markdown.markdown({"machine": {"gpu": "x"}}).startswith("# Attention on a GPU")
