"""FasterTransformer: its GPT decoders in PyTorch, without its library and on the CPU.

    from anyflash.adapters import fastertransformer as anyflash_for_fastertransformer

    anyflash_for_fastertransformer.install()

`install` puts the operators `ParallelGptContextDecoderOp` and `ParallelGptDecoderOp` under
`torch.classes.FasterTransformer`, from where `GptContextDecoder` and `GptDecoder` take them. On a GPU, where
FasterTransformer's library is loaded, its own stay.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

name = "fastertransformer"
source = Checkout(
    package="FasterTransformer",
    variable="ANYFLASH_SRC_FASTERTRANSFORMER",
    repository="https://github.com/NVIDIA/FasterTransformer",
    revision="df4a753",
)
target = Target(
    package="FasterTransformer",
    module="examples.pytorch.gpt.utils.gpt_decoder",
    minimum="5.3",
    below="5.4",
    how_to_install=source.how_to_install,
)

_WEIGHTS = 12

_undo: list[Callable[[], object]] = []


def importable() -> AbstractContextManager[Path]:
    """Within: its modules come from the checkout, whose folders are no packages."""
    parts = target.module.split(".")[:-1]
    return source.importable(*(".".join(parts[: i + 1]) for i in range(len(parts))))


class _Operators:
    """What `torch.classes.FasterTransformer` is meanwhile: ours for weights on the CPU, else theirs."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __getattr__(self, operator: str) -> Any:
        from anyflash.adapters._fastertransformer import operators

        if operator not in ("ParallelGptContextDecoderOp", "ParallelGptDecoderOp"):
            return getattr(self._theirs, operator)

        def make(*args: Any) -> Any:
            if args[_WEIGHTS][0].is_cuda:
                return getattr(self._theirs, operator)(*args)
            return getattr(operators, operator)(*args)

        return make


def install() -> None:
    """Put our operators in their place. Raises ImportError without torch."""
    if _undo:
        return
    target.warn_if_untested()
    import torch

    had = torch.classes.__dict__.get("FasterTransformer")
    # Asking torch.classes for a name makes a place for it, whether a library has filled it or not.
    torch.classes.FasterTransformer = _Operators(torch.classes.FasterTransformer)

    def undo() -> None:
        if had is None:
            del torch.classes.FasterTransformer
        else:
            torch.classes.FasterTransformer = had

    _undo.append(undo)


def remove() -> None:
    """Put `torch.classes` back as it was. Decoders that have an operator keep it."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if a token decoded on a prompt's caches is what the longer prompt gives; else what is wrong."""
    try:
        import torch

        from anyflash.adapters._fastertransformer import operators
    except ImportError as error:
        return f"{error}: pip install torch"
    heads, dim, rows = 2, 8, 7
    hidden = heads * dim
    shapes = [(hidden,)] * 2 + [(hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    shapes += [(hidden,)] * 2 + [(hidden, 4 * hidden), (4 * hidden,), (4 * hidden, hidden), (hidden,)]
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, dtype=torch.float64, generator=generator)
    settings = (heads, dim, 4 * hidden, 1, 1, 1, 1e-6, "pre_layernorm", "gelu", False, 0, 0)
    weights = [draw(shape) for shape in shapes], [], []
    x, keep = draw((1, rows, hidden)), torch.ones(1, rows, rows, dtype=torch.float64).tril()
    prompts = operators.ParallelGptContextDecoderOp(*settings, *weights, True)
    whole, *_ = prompts.forward(x, keep, torch.tensor([rows]))
    short = x[:, :-1].contiguous(), keep[:, :-1, :-1], torch.tensor([rows - 1])
    _, key_cache, value_cache, _ = prompts.forward(*short, rows)
    no = torch.zeros(1, dtype=torch.bool)
    row = torch.tensor([rows - 1]), no, torch.tensor([0]), torch.zeros(1, rows, dtype=torch.bool)
    steps = operators.ParallelGptDecoderOp(*settings, *weights)
    (token,) = steps.forward(rows - 1, rows, 0, x[:, -1], *row, key_cache, value_cache)
    return disagreement("a decoded token", token, whole[:, -1], 256)
