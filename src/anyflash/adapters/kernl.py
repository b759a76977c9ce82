"""Kernl's idea, rewriting attention in the graph of a model, as a backend of `torch.compile`.

    from anyflash.adapters import kernl as anyflash_for_kernl

    anyflash_for_kernl.install()
    fast = torch.compile(model, backend="anyflash")  # options={"then": "inductor"} compiles the rest, too

The backend needs no Kernl: it finds attention by its softmax, in models that Kernl's three patterns do not
reach any more, forward and backward. Where Kernl is here, `install` gives its patterns our attention as well;
`torch.compile(model, backend=anyflash_for_kernl.kernls_patterns)` runs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

name = "kernl"
source = Checkout(
    package="kernl",
    variable="ANYFLASH_SRC_KERNL",
    repository="https://github.com/ELS-RD/kernl",
    revision="91e2cd9",
)
target = Target(
    package="kernl",
    module="kernl.optimizer.attention",
    minimum="0.2.2",
    below="0.3",
    how_to_install=source.how_to_install,
)

_BACKEND = "anyflash"

_undo: list[Callable[[], object]] = []


@contextmanager
def importable() -> Iterator[Path]:
    """Within: Kernl's rewriting comes from the checkout, without its kernels in Triton."""
    kernels = ("kernl.implementations.attention", "kernl.implementations.attention_skinny")
    with source.importable("kernl", "kernl.implementations", stubs=kernels, under="src") as root:
        for module in kernels:
            for function in ("attention_forward", "attention_reference", "skinny_attention_forward"):
                setattr(sys.modules[module], function, None)
        yield root


def backend(gm: Any, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
    """A backend for `torch.compile`, also without `install()`: `torch.compile(model, backend=backend)`."""
    from anyflash.adapters._kernl import backend as ours

    return ours.backend(gm, example_inputs, **kwargs)


def kernls_patterns(gm: Any, example_inputs: Any) -> Callable[..., Any]:
    """A backend for `torch.compile` that runs Kernl's own patterns; with our attention after `install()`."""
    from anyflash.adapters._kernl import backend as ours

    return ours.kernls_patterns(gm, example_inputs)


def install() -> None:
    """Name the backend, and give Kernl's patterns our attention if it is here. Raises ImportError without
    torch."""
    if _undo:
        return
    from torch._dynamo.backends import registry

    registry.register_backend(backend, name=_BACKEND)

    def forget() -> None:
        del registry._COMPILER_FNS[_BACKEND], registry._BACKENDS[_BACKEND]

    _undo.append(forget)
    if not _is_here():
        return
    target.warn_if_untested()
    from kernl.optimizer import attention

    from anyflash.adapters._kernl.call import attention_of_kernl

    own = attention.attention_wrapper
    attention.attention_wrapper = attention_of_kernl
    _undo.append(lambda: setattr(attention, "attention_wrapper", own))


def _is_here() -> bool:
    """A package of that name may be another, as that of PyPI is."""
    try:
        return find_spec(target.module) is not None
    except ModuleNotFoundError:
        return False


def remove() -> None:
    """Forget the backend's name, and put Kernl's own attention back. What is compiled stays as it is."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if an attention rewritten in a graph agrees with the graph as it was; else what is wrong."""
    try:
        import torch
        from torch.fx.passes.fake_tensor_prop import FakeTensorProp

        from anyflash.adapters._kernl.backend import rewrite
    except ImportError as error:
        return f"{error}: pip install torch"
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 7, 8),) * 3 + ((2, 1, 1, 7),)
    q, k, v, mask = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)

    def plain(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return torch.softmax(q @ k.transpose(-1, -2) / 3.0 + mask, -1) @ v

    graph = torch.fx.symbolic_trace(plain)
    FakeTensorProp(graph).propagate(q, k, v, mask)
    if rewrite(graph) != 1:
        return "an attention of the plainest form was not found in its graph"
    return disagreement("rewritten attention", graph(q, k, v, mask), plain(q, k, v, mask))
