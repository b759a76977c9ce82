"""The emulator on kernels of its own: right under every schedule, and every fault named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
pytest.importorskip("torch")

import numpy as np
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from anyflash.kernels.gluon.hopper import barrier_arrive, barrier_init, barriers
from gpu import emulated_faults as faults
from gpu import emulated_kernels as kernels
from gpu.emulator import emulate
from gpu.emulator.errors import (
    BarrierMisuse,
    Deadlock,
    EmulationError,
    InFlight,
    Mismatch,
    MissingFence,
    OutOfBounds,
    Race,
    Unknown,
)
from gpu.emulator.mutations import mutations, noticed
from gpu.emulator.tensor import Int, Tensor
from gpu.emulator.tma import Descriptor

POLICIES = range(9)
_GLUON = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.float8_e4m3fn: gl.float8e4nv}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def boxes(tensor: Any, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _GLUON[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def copies(seed: int, replaced: Any) -> bool:
    x = torch.randn(200, 64).bfloat16()
    y = torch.full_like(x, float("nan"))
    emulate(kernels.copy, (4,), boxes(x, [64, 64]), boxes(y, [64, 64]), seed=seed, replaced=replaced)
    return torch.equal(x, y)


def doubles(seed: int, replaced: Any) -> bool:
    x = torch.randn(300, 64).bfloat16()
    y = torch.full_like(x, float("nan"))
    ends = boxes(x, [64, 64]), boxes(y, [64, 64])
    emulate(kernels.double, (1,), *ends, 5, seed=seed, replaced=replaced, STAGES=2)
    return torch.equal(2 * x, y)


def multiplies(seed: int, replaced: Any) -> bool:
    a, b, c = torch.randn(128, 320).bfloat16(), torch.randn(320, 64).bfloat16(), torch.ones(128, 64)
    arguments = (boxes(x, [64, 64]) for x in (a, b, c))
    emulate(kernels.product, (1,), *arguments, 5, seed=seed, replaced=replaced, STAGES=2)
    wanted = a.double() @ b.double() + 1
    # Each of 5 sums, and the addition to c, is rounded once.
    return bool((c - wanted).abs().max() <= 6 * torch.finfo(torch.float32).eps * wanted.abs().max())


RUNS: dict[str, tuple[Callable[[int, Any], bool], list[Any]]] = {
    "copy": (copies, [kernels.copy]),
    "ring": (doubles, [kernels.double, kernels.ring_producer, kernels.ring_consumer]),
    "product": (multiplies, [kernels.product, kernels.product_producer, kernels.product_consumer]),
}


@pytest.mark.parametrize("name", RUNS)
def test_right_under_every_policy(name: str) -> None:
    for seed in POLICIES:
        assert RUNS[name][0](seed, None)


@pytest.mark.parametrize("name", RUNS)
def test_every_mutation_is_noticed(name: str) -> None:
    run, functions = RUNS[name]
    tried = list(mutations(functions))
    assert len(tried) > 8
    assert [m.name for m in tried if noticed(run, m, POLICIES) is None] == []


VALUES = {
    "layouts": (Mismatch, "different layouts"),
    "layouts of where": (Mismatch, "different layouts"),
    "ranks": (Mismatch, "different ranks"),
    "expanded axis": (Mismatch, "sliced along 1"),
    "warps": (Mismatch, "8 warps in a partition of 4"),
    "extents": (Mismatch, "powers of two"),
    "load outside": (OutOfBounds, "elements 1 to 64 of a tensor of 64"),
    "store outside": (OutOfBounds, "elements -1 to 62"),
    "32 bits": (OutOfBounds, "does not fit 32 bits"),
    "not modelled": (Unknown, "gl.dot_fma"),
    "constexpr": (Mismatch, "N is a constexpr"),
    "no number": (Mismatch, "here wants an int32 number"),
    "two stores": (Race, "program number 1 has stored"),
    "half exponent": (Mismatch, "exp2 wants float32"),
    "assertion": (EmulationError, "63 rows"),
}


@pytest.mark.parametrize("fault", VALUES)
def test_values(fault: str) -> None:
    kind, said = VALUES[fault]
    with pytest.raises(kind, match=said):
        emulate(faults.values, (2,), torch.zeros(64), fault)


MEMORY = {
    "stage": (Mismatch, "stage 2 is asked for"),
    "stored shape": (Mismatch, r"stored is \[64, 64\]"),
    "stored type": (Mismatch, "stored is .*float32"),
    "read while loaded": (Race, r"reads tile\[0\].*nothing orders this after: the TMA load"),
    "load in flight at the end": (InFlight, "is in flight"),
    "box of another shape": (Mismatch, r"a box of \[64, 64\]"),
    "stored and not fenced": (MissingFence, "TMA store .*no fence lies between"),
    "overwritten while stored": (Race, "writes tile.*the TMA store"),
    "multiplied and not fenced": (MissingFence, "wgmma .*no fence lies between"),
    "overwritten while multiplied": (Race, "writes tile.*the wgmma"),
    "product used in flight": (InFlight, "used before it is waited for"),
    "product not waited for": (InFlight, "ends without waiting"),
    "two sums of one": (InFlight, "two products add"),
    "register operand": (Mismatch, "a register operand"),
    "sum's layout": (Mismatch, "accumulator wants an NVMMADistributedLayout"),
    "arrivals": (BarrierMisuse, "takes 1 arrivals a phase"),
    "nobody comes": (Deadlock, r"phase 0 of full\[0\], 1 arrivals"),
    "not initialised": (BarrierMisuse, "before it is initialised"),
    "named": (BarrierMisuse, "128 threads come"),
    "initialised twice": (BarrierMisuse, "a second time"),
    "too much memory": (EmulationError, "bytes of shared memory, of 232448"),
}


@pytest.mark.parametrize("fault", MEMORY)
def test_memory(fault: str) -> None:
    kind, said = MEMORY[fault]
    x = torch.zeros(64, 64).bfloat16()
    for seed in POLICIES:
        with pytest.raises(kind, match=said):
            emulate(faults.memory, (1,), boxes(x, [64, 64]), boxes(x, [64, 64]), fault, seed=seed)


def test_two_phases_under_one_wait() -> None:
    """A sender that does not wait for its receiver can end two phases before the first is seen."""
    x = torch.zeros(64, 64).bfloat16()
    for seed in POLICIES:
        with pytest.raises(BarrierMisuse, match=r"phase 1.*(hides|nothing orders)|phase 0.*hides"):
            emulate(faults.between, (1,), boxes(x, [64, 64]), "phases", seed=seed)


def test_written_without_order() -> None:
    x = torch.zeros(64, 64).bfloat16()
    for seed in POLICIES:
        with pytest.raises((Race, BarrierMisuse)):
            emulate(faults.between, (1,), boxes(x, [64, 64]), "written without order", seed=seed)


def test_initialised_by_a_partition_for_another() -> None:
    x = torch.zeros(64, 64).bfloat16()
    for seed in POLICIES:
        with pytest.raises(BarrierMisuse, match="initialis"):
            emulate(faults.between, (1,), boxes(x, [64, 64]), "initialised too late", seed=seed)


def test_registers_of_a_partition() -> None:
    with pytest.raises(Mismatch, match="multiples of 8"):
        emulate(faults.between, (1,), boxes(torch.zeros(64, 64).bfloat16(), [64, 64]), "registers")


def add_in_turn(seed: int, takes_turns: bool, resident: int = 4) -> int:
    total, counter = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    emulate(kernels.in_turn, (4,), total, counter, takes_turns, seed=seed, resident=resident, exclusive=False)
    return int(total)


def out_of_turn(seed: int) -> str:
    with pytest.raises(Race, match="no atomics order the two") as found:
        add_in_turn(seed, False)
    return str(found.value)


def test_programs_take_turns() -> None:
    assert {add_in_turn(seed, True) for seed in POLICIES} == {11}
    assert len({out_of_turn(seed) for seed in POLICIES}) > 1


def test_a_run_is_a_function_of_its_seed() -> None:
    for seed in range(30):
        assert out_of_turn(seed) == out_of_turn(seed)


@pytest.mark.parametrize("fault", ["", "no barrier", "relaxed", "a block's scope"])
def test_sums_of_other_programs(fault: str) -> None:
    """The last of three programs to count itself may read what they stored: if an atomic released and
    acquired it on the device, behind a barrier of the threads that stored."""
    for seed in POLICIES:
        parts, count, total = (torch.zeros(n, dtype=torch.int32) for n in (96, 1, 32))
        arguments = (kernels.counted, (3,), parts, count, total, fault)
        if fault:
            with pytest.raises(Race, match="no atomics order the two"):
                emulate(*arguments, seed=seed, resident=3)
        else:
            emulate(*arguments, seed=seed, resident=3)
            assert total.tolist() == [6] * 32


def test_waiting_for_a_program_that_is_not_there() -> None:
    counter = torch.ones(1, dtype=torch.int32)
    with pytest.raises(Deadlock, match="another value of an atomic"):
        emulate(kernels.in_turn, (1,), torch.zeros(1, dtype=torch.int32), counter, True)


def handed_on(seed: int, read_only: bool) -> bool:
    x = torch.cat([torch.ones(64, 32), torch.zeros(64, 32)])
    y, flag = torch.zeros(64, 32), torch.zeros(1, dtype=torch.int32)
    emulate(kernels.handed_on, (2,), boxes(x, [64, 32]), x[64:], flag, y, read_only, seed=seed, resident=2)
    assert bool((x == 1).all())
    return bool((y == 1).all())


def test_a_store_that_has_been_read_is_not_yet_written() -> None:
    """Another program may see what TMA stores only after a wait for more than its reads."""
    assert not all(handed_on(seed, True) for seed in POLICIES)
    assert all(handed_on(seed, False) for seed in POLICIES)


def test_names_in_messages() -> None:
    with pytest.raises(BarrierMisuse, match=r"^full\[0\] is used at .*test_emulator.py:\d+"):
        emulate(named, (1,))


@gluon.jit
def named():
    empty, full = barriers(1), barriers(1)
    barrier_init(empty.index(0), count=1)
    barrier_arrive(full.index(0), count=1)


def test_pointers() -> None:
    x, lengths = torch.randn(50, 16), torch.tensor([0, 3, 20, 50], dtype=torch.int32)
    y = torch.full((50,), float("nan"))
    emulate(kernels.row_sums, (3,), x, y, lengths, 32, 16)
    assert bool(
        (y - x.double().sum(1)).abs().max() <= 16 * torch.finfo(torch.float32).eps * x.abs().sum(1).max()
    )


def test_8_bits() -> None:
    a, b = (torch.randn(64, 64).to(torch.float8_e4m3fn) for _ in range(2))
    c = torch.full((64, 64), float("nan"))
    emulate(kernels.product_of_8_bits, (1,), boxes(a, [64, 64]), boxes(b, [64, 64]), c, True)
    assert torch.equal(c, (a.double() @ b.double().T).float())
    with pytest.raises(Mismatch, match="along k only"):
        emulate(kernels.product_of_8_bits, (1,), boxes(a, [64, 64]), boxes(b, [64, 64]), c, False)


@dataclass(frozen=True)
class Address:
    address: int
    dtype: Any

    def data_ptr(self) -> int:
        return self.address


@pytest.mark.parametrize("known", [True, False])
def test_bare_addresses(known: bool) -> None:
    """Bounded by the arrays that are named, or by pages alone."""
    x, y = np.ones((50, 16), np.float32), np.zeros(50, np.float32)
    lengths = np.array([0, 3, 20, 50], np.int32)
    given = [
        Address(array.__array_interface__["data"][0], getattr(torch, str(array.dtype)))
        for array in (x, y, lengths)
    ]
    memory = (x, y, lengths) if known else ()
    emulate(kernels.row_sums, (3,), *given, 32, 16, memory=memory)
    assert (y == 16).all()
    if known:
        with pytest.raises(OutOfBounds, match="of a tensor of 4 are addressed"):
            emulate(kernels.row_sums, (4,), *given, 32, 16, memory=memory)
    with pytest.raises(OutOfBounds, match="nothing lies at address"):
        emulate(kernels.row_sums, (1,), Address(8, torch.float32), *given[1:], 32, 16, memory=memory)


def test_boxes_past_the_edges() -> None:
    x = torch.arange(60.0).view(6, 10)[:, :8].contiguous()
    layout = gl.NVMMASharedLayout(0, 32)
    described = Descriptor(x.view(-1), 0, x.shape, x.stride(), [4, 4], layout)
    got = described.read([4, 6])
    assert torch.equal(got[:2, :2], x[4:, 6:])
    assert not got[2:].any() and not got[:, 2:].any()
    assert torch.equal(described.read([-1, 0])[1:], x[:3, :4])
    assert not described.read([6, 0]).any()


BOXES = [
    ((64, 64), (60, 1), (16, 16), "of 16 bytes"),
    ((64, 64), (64, 2), (16, 16), "the last has step 1"),
    ((64, 64), (2**39, 1), (16, 16), r"2\*\*40 bytes"),
    ((0, 64), (64, 1), (16, 16), "extents of 1"),
    ((64, 64), (64, 1), (512, 16), "a box of"),
]


@pytest.mark.parametrize(("shape", "steps", "block", "said"), BOXES)
def test_what_a_tensor_map_cannot_hold(shape: Any, steps: Any, block: Any, said: str) -> None:
    with pytest.raises(Mismatch, match=said):
        Descriptor(torch.zeros(4096).bfloat16(), 0, shape, steps, block, None)


def test_addresses_wrap() -> None:
    """A window whose last rows are a sequence's: the first axis takes a whole turn, less as many steps."""
    far, step = 2**30, 16
    x = torch.arange(20.0 * step).view(20, step).bfloat16()
    extents, steps = (far + 1, far, far, step), (2**34 - step, step, step, 1)
    described = Descriptor(x.view(-1), 0, extents, steps, [1, 1, 8, step], None)
    start, length = 3, 5
    for row in (0, 2, 5):
        got = described.read([far, start + length, far - length + row, 0])[0, 0]
        wanted = torch.zeros(8, step).bfloat16()
        wanted[: length - row] = x[start + row : start + length]
        assert torch.equal(got, wanted)


INTEGERS = [
    (lambda a, b: a // b, (-7, 2), -3),
    (lambda a, b: a % b, (-7, 2), -1),
    (lambda a, b: a // b, (7, -2), -3),
    (lambda a, b: -a + b, (3, 1), -2),
    (lambda a, b: ~(a < b), (1, 2), 0),
]


@pytest.mark.parametrize(("formula", "given", "wanted"), INTEGERS)
def test_integers(formula: Any, given: tuple[int, int], wanted: int) -> None:
    a, b = given
    assert formula(Int(a), Int(b)) == wanted
    assert formula(Int(a), b) == wanted
    blocks = formula(*(Tensor(torch.full((4,), x, dtype=torch.int32)) for x in given))
    assert blocks.data.tolist() == [wanted] * 4


def test_types_are_promoted_by_type() -> None:
    block = Tensor(torch.ones(2, dtype=torch.int32))
    assert (block * Int(1, 64)).data.dtype == torch.int64
    assert (block * 1).data.dtype == torch.int32
    assert (block * 1.0).data.dtype == torch.float32
    assert (Tensor(torch.ones(2, dtype=torch.bfloat16)) * 2.0).data.dtype == torch.bfloat16
    assert (Int(1) + Int(1, 64)).bits == 64
