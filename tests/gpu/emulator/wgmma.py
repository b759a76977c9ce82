"""wgmma: products in the tensor cores, one after the other for a partition, waited for by number.

A product reads shared memory, and registers, at some time from its issue to its wait; both ends are tried.
Until then nobody may write what it reads, and its accumulator is a token that only another product, or the
wait, may take. An instruction's sum, of 32 bytes of each row, is formed in float64 and rounded to float32.

The hardware keeps fewer bits of a sum of 8-bit products: terms are cut off at so many bits below the greatest
of them, 32 products and the sum so far at a time. That is modelled where SUM_BITS says so (about 14, as users
of H800 found: DeepSeek-V3, arXiv 2412.19437, 3.3.2); otherwise results are those of float64, which cases are
judged by.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from triton.experimental.gluon import language as gl

from gpu.emulator import machine
from gpu.emulator.dtypes import to_gluon
from gpu.emulator.errors import InFlight, Mismatch, Unknown
from gpu.emulator.memory import Operation, SharedMemory
from gpu.emulator.scheduler import Task
from gpu.emulator.source import where
from gpu.emulator.tensor import Tensor

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SUM_BITS: int | None = None
_NARROW = (torch.float16, torch.bfloat16, *_FP8)


class Accumulator:
    """The result of a product in flight."""

    def __init__(self, operation: Operation, shape: list[int], layout: Any) -> None:
        self.operation = operation
        self.shape = shape
        self.layout = layout
        self.spent = False
        self.result: torch.Tensor | None = None

    dtype = to_gluon(torch.float32)

    def __repr__(self) -> str:
        return f"the result of {self.operation}, not waited for"

    def refuse(self, *_operands: Any, **_more: Any) -> NoReturn:
        raise InFlight(f"the result of {self.operation} is used before it is waited for, at {where()}")

    to = __getitem__ = __neg__ = __bool__ = refuse

    def __getattr__(self, name: str) -> NoReturn:
        self.refuse()


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "lt", "le", "gt", "ge"):
    setattr(Accumulator, f"__{_name}__", Accumulator.refuse)
    setattr(Accumulator, f"__r{_name}__", Accumulator.refuse)


class _Product:
    def __init__(self, a: Any, b: SharedMemory, acc: Any, use_acc: bool, token: Accumulator) -> None:
        self.token = token
        self._operands = (a, b, acc, use_acc)
        for buffer in (a, b):
            if isinstance(buffer, SharedMemory):
                buffer.touch(False, token.operation)

    def compute(self) -> None:
        if self.token.result is not None:
            return
        a, b, acc, use_acc = self._operands
        before = (acc.result if isinstance(acc, Accumulator) else acc.data) if use_acc else 0.0
        left, right = (x.data.to(torch.float64) for x in (a, b))
        if SUM_BITS is None or a.data.dtype not in _FP8:
            result = by_instruction(left, right, before, 32 // a.data.element_size())
        else:
            result = summed(left, right, before, SUM_BITS)
        self.token.result = result.to(torch.float32)


def by_instruction(a: torch.Tensor, b: torch.Tensor, before: Any, depth: int) -> Any:
    """before + a . b, rounded to float32 after each `depth` terms: those of an instruction."""
    parts = torch.bmm(a.unflatten(1, (-1, depth)).transpose(0, 1), b.unflatten(0, (-1, depth)))
    total = before
    for part in parts:
        total = (part + total).to(torch.float32)
    return total


def summed(a: torch.Tensor, b: torch.Tensor, before: Any, bits: int) -> torch.Tensor:
    """before + a . b in float64, of which each step of 32 terms keeps `bits` bits."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64) + before
    for first in range(0, a.shape[1], 32):
        step = slice(first, first + 32)
        terms = torch.cat((total[:, None], a[:, step, None] * b[None, step]), 1)
        unit = torch.exp2(torch.frexp(terms.abs().amax(1, True)).exponent - bits)
        total = ((terms / unit).trunc() * unit).sum(1)
    return total


def _check_layouts(a: Any, b: SharedMemory, acc: Any) -> None:
    bits = 8 * a.data.element_size()
    layout = acc.layout
    if not isinstance(layout, gl.NVMMADistributedLayout) or list(layout.version) != [3, 0]:
        raise Mismatch(f"a wgmma accumulator wants an NVMMADistributedLayout of version [3, 0], not {layout}")
    m, n, k = layout.instr_shape
    if m != 16 or k != 256 // bits or n > acc.shape[1] or acc.shape[1] % n or n % 8:
        raise Mismatch(f"wgmma of {m} x {n} x {k} for {acc.shape} and operands of {bits} bits, at {where()}")
    rows = layout.warps_per_cta[0] * 16
    if acc.shape[0] % rows:
        raise Mismatch(f"{acc.shape[0]} rows for {layout.warps_per_cta} warps, at {where()}")
    if isinstance(a, Tensor):
        wanted = gl.DotOperandLayout(0, layout, 32 // bits)
        if a.layout is not None and a.layout != wanted:
            raise Mismatch(f"a register operand of wgmma is laid out as {a.layout}, not {wanted}")
    for buffer, along_k in ((a, False), (b, True)):
        if not isinstance(buffer, SharedMemory) or buffer.layout is None:
            continue
        if not isinstance(buffer.layout, gl.NVMMASharedLayout):
            raise Mismatch(f"wgmma reads {buffer.name} laid out as {buffer.layout}, at {where()}")
        if bits == 8 and buffer.layout.transposed is not along_k:
            raise Mismatch(f"operands of 8 bits are read along k only; {buffer.name}, at {where()}")


def mma(a: Any, b: Any, acc: Any, *, use_acc: Any = True, precision: Any = None,
        max_num_imprecise_acc: Any = None, is_async: Any = False) -> Any:  # fmt: skip
    if not isinstance(b, SharedMemory) or not isinstance(a, Tensor | SharedMemory):
        raise Mismatch(
            f"wgmma takes a from registers or shared memory and b from shared memory, at {where()}"
        )
    if not isinstance(acc, Tensor | Accumulator):
        raise Mismatch(f"wgmma adds to a tensor or to another product, not to {acc!r}")
    if a.data.dtype not in _NARROW or b.data.dtype not in _NARROW:
        raise Unknown(f"wgmma of {a.data.dtype} and {b.data.dtype}: only 8 and 16 bits are modelled")
    if (a.data.dtype in _FP8) != (b.data.dtype in _FP8) or (a.data.dtype not in _FP8 and a.dtype != b.dtype):
        raise Mismatch(f"wgmma of {a.dtype} and {b.dtype}")
    (m, k), (k_too, n) = a.shape, b.shape
    if k != k_too or list(acc.shape) != [m, n]:
        raise Mismatch(f"wgmma of {a.shape} and {b.shape} to {acc.shape}, at {where()}")
    if acc.dtype != to_gluon(torch.float32):
        raise Mismatch(f"wgmma adds to float32, not {acc.dtype}")
    _check_layouts(a, b, acc)
    if isinstance(acc, Accumulator):
        if acc.spent:
            raise InFlight(f"two products add to the result of {acc.operation}, at {where()}")
        acc.spent = True
    run, task = machine.scheduler(), machine.task()
    run.pause()
    token = Accumulator(Operation.issued("wgmma"), [m, n], acc.layout)
    task.products.append(_Product(a, b, acc, bool(use_acc), token))
    if not run.policy.late():
        for product in task.products:
            product.compute()
    return token if bool(is_async) else wait(0, (token,))


def wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    if deps is None:
        raise Mismatch(f"a wait for wgmma must be given deps, at {where()}")
    run, task = machine.scheduler(), machine.task()
    run.pause()
    while len(task.products) > int(num_outstanding):
        product = task.products.pop(0)
        product.compute()
        task.clock.done |= 1 << product.token.operation.number
    values = []
    for dep in deps:
        if isinstance(dep, Accumulator):
            if dep.spent or not task.clock.finished(dep.operation.number):
                dep.refuse()
            dep = Tensor(dep.result, dep.layout)
        values.append(dep)
    return values[0] if len(values) == 1 else tuple(values)


def fence(cluster: Any = False) -> None:
    machine.scheduler().pause()
    task = machine.task()
    task.clock.fence(task.index)


def check_over(task: Task) -> None:
    if task.products:
        raise InFlight(f"{task.name} ends without waiting for {task.products[0].token.operation}")
