"""Uni-Fold and Uni-Core: the attention of its rows, columns and triangles, and of Uni-Core's layers.

    from anyflash.adapters import unifold as anyflash_for_unifold

    anyflash_for_unifold.install()

`install` gives the classes another forward, also in models that exist already. Uni-Fold's global attention of
extra alignments has one query a column, so its scores are few; it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

name = "unifold"
target = Target(
    package="unifold",
    module="unifold",
    minimum="2.0",
    below="3",
    how_to_install="pip install git+https://github.com/dptech-corp/Uni-Core git+https://github.com/dptech-corp/Uni-Fold",
)

source = Checkout(
    package="Uni-Fold",
    variable="ANYFLASH_SRC_UNIFOLD",
    repository="https://github.com/dptech-corp/Uni-Fold",
    revision="7b55789",
)
core = Checkout(
    package="Uni-Core",
    variable="ANYFLASH_SRC_UNICORE",
    repository="https://github.com/dptech-corp/Uni-Core",
    revision="ace6fae",
)

_undo: list[Callable[[], object]] = []


@contextmanager
def importable() -> Iterator[Path]:
    """Within: its modules come from the two checkouts, without what their packages import for training."""
    with core.importable("unicore"), source.importable("unifold", "unifold.modules") as root:
        yield root


def install() -> None:
    """Give both packages' attention our forward. Raises ImportError if one or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    from unicore.modules import CrossMultiheadAttention, SelfMultiheadAttention
    from unifold.modules.attentions import Attention

    from anyflash.adapters._unifold import attention as ours

    classes = Attention, SelfMultiheadAttention, CrossMultiheadAttention
    own = [c.forward for c in classes]
    Attention.forward = ours.attention
    SelfMultiheadAttention.forward = ours.self_attention(SelfMultiheadAttention.forward)
    CrossMultiheadAttention.forward = ours.cross_attention

    def undo() -> None:
        for c, forward in zip(classes, own, strict=True):
            c.forward = forward

    _undo.append(undo)


def remove() -> None:
    """Put their own forwards back."""
    while _undo:
        _undo.pop()()


def self_check() -> str | None:
    """None if attention with a mask and a pair bias agrees with Uni-Fold's own; else what is wrong."""
    was_installed = bool(_undo)
    remove()
    try:
        import torch
        from unifold.modules.attentions import Attention

        from anyflash.adapters._unifold.attention import attention
    except ImportError as error:
        return f"{error}: {target.how_to_install}"
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        layer = Attention(16, 16, 16, 8, 2).double()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        shapes = (1, 3, 7, 16), (1, 3, 1, 1, 7), (1, 1, 2, 7, 7)
        x, mask, pair = (torch.randn(s, dtype=torch.float64) for s in shapes)
        own = layer(x, x, x, mask, pair)
        return disagreement("attention with two biases", attention(layer, x, x, x, mask, pair), own)
    finally:
        torch.set_rng_state(state)
        if was_installed:
            install()
