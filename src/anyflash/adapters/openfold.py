"""OpenFold: the attention of its rows, columns and triangles.

    from anyflash.adapters import openfold as anyflash_for_openfold

    anyflash_for_openfold.install()

`install` replaces the function behind OpenFold's default attention, which its chunked and checkpointed forms
call too. The flags that choose another kernel (DeepSpeed's, "lma", flash) go past it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

name = "openfold"
target = Target(
    package="openfold",
    module="openfold",
    minimum="2.0",
    below="3",
    how_to_install="pip install --no-build-isolation git+https://github.com/aqlaboratory/openfold",
)

source = Checkout(
    package="openfold",
    variable="ANYFLASH_SRC_OPENFOLD",
    repository="https://github.com/aqlaboratory/openfold",
    revision="ce0029e",
)

_undo: list[Callable[[], object]] = []


def importable() -> AbstractContextManager[Path]:
    """Within: its modules come from the checkout, without the imports of its packages and its CUDA kernel."""
    return source.importable(
        "openfold", "openfold.model", "openfold.utils", stubs=("attn_core_inplace_cuda",)
    )


def install() -> None:
    """Put our function in OpenFold's place. Raises ImportError if OpenFold or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from openfold.model import primitives

    from anyflash.adapters._openfold.attention import attention_for_openfold

    own = primitives._attention
    primitives._attention = attention_for_openfold
    _undo.append(lambda: setattr(primitives, "_attention", own))


def remove() -> None:
    """Put OpenFold's own function back."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if ours agrees with OpenFold's function on two biases; else what is wrong."""
    was_installed = bool(_undo)
    remove()
    try:
        import torch
        from openfold.model import primitives

        from anyflash.adapters._openfold.attention import attention_for_openfold
    except ImportError as error:
        return f"{error}: {target.how_to_install}"
    try:
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, 3, 2, 7, 8),) * 3 + ((1, 3, 1, 1, 7), (1, 1, 2, 7, 7))
        q, k, v, mask, pair = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
        own = primitives._attention(q, k, v, [mask, pair])
        ours = attention_for_openfold(q, k, v, [mask, pair])
        return disagreement("attention with two biases", ours, own)
    finally:
        if was_installed:
            install()
