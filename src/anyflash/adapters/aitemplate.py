"""AITemplate: its models, built by its front end as ever, run on the CPU.

    from anyflash.adapters import aitemplate as anyflash_for_aitemplate

    anyflash_for_aitemplate.install()  # before `from aitemplate.compiler import compile_model`
    program = compile_model(outputs, detect_target(), "./tmp", "name")
    program.set_many_constants_with_tensors(parameters)
    program.run_with_tensors(inputs, outputs)

`install` gives `compile_model` a program that runs the graph with our attention, and `detect_target` an
answer where there is no GPU. With a GPU that AITemplate finds, nothing is replaced; `program(outputs)` here
makes one of any graph.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

if TYPE_CHECKING:
    from anyflash.adapters._aitemplate.program import Program

name = "aitemplate"
source = Checkout(
    package="aitemplate",
    variable="ANYFLASH_SRC_AITEMPLATE",
    repository="https://github.com/facebookincubator/AITemplate",
    revision="c8aad37",
)
target = Target(
    package="aitemplate",
    module="aitemplate",
    minimum="0.3",
    below="0.4",
    how_to_install=source.how_to_install,
)

# With it set, AITemplate builds graphs for an imagined GPU.
_WITHOUT_GPU = "AIT_BUILD_DOCS"

_undo: list[Callable[[], object]] = []


def importable() -> AbstractContextManager[Path]:
    """Within: its modules come from the checkout."""
    return source.importable(under="python")


def program(outputs: Any, constants: Mapping[str, Any] | None = None) -> Program:
    """The graph that ends in these tensors, with our attention; its methods: `_aitemplate/program.py`."""
    from anyflash.adapters._aitemplate.program import Program

    return Program(outputs, constants)


def install() -> None:
    """Put our `compile_model` in AITemplate's place. Raises ImportError if AITemplate or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from aitemplate import compiler
    from aitemplate.testing import detect_target

    from anyflash.adapters._aitemplate.program import compile_model

    if _finds_gpu(detect_target):
        return
    os.environ[_WITHOUT_GPU] = "1"
    _undo.append(lambda: os.environ.pop(_WITHOUT_GPU, None))
    for module in (compiler, importlib.import_module("aitemplate.compiler.compiler")):
        own = module.compile_model
        module.compile_model = compile_model
        _undo.append(lambda module=module, own=own: setattr(module, "compile_model", own))


def _finds_gpu(detect_target: Callable[[], Any]) -> bool:
    if _WITHOUT_GPU in os.environ:
        return False
    try:
        detect_target()
    except RuntimeError:
        return False
    return True


def remove() -> None:
    """Put AITemplate's own back. Programs that were made stay what they are."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if AITemplate's attention operator, run, is attention; else what is wrong."""
    was_installed = bool(_undo)
    try:
        import torch
        from aitemplate.compiler import ops
        from aitemplate.frontend import Tensor

        install()
    except ImportError as error:
        return target.absent() or target.unusable(error)
    try:
        shape = [2, 3, 7, 8]
        tensors = [Tensor(shape=shape, name=each, is_input=True) for each in "qkv"]
        graph = program(ops.mem_eff_attention(causal=False)(*tensors))
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in "qkv")
        (ours,) = graph.run({"q": q, "k": k, "v": v})
        own = (q * 8**-0.5 @ k.mT).softmax(-1) @ v
        return disagreement("mem_eff_attention", ours.transpose(1, 2), own)
    finally:
        if not was_installed:
            remove()
