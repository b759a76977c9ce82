"""Masks to pass as `mask=`: which keys each query may see. They combine with `&`, `|` and `~`.

>>> from anyflash import masks
>>> print((masks.causal() & masks.window(left=2) | masks.prefix(1)).draw(5, 5))
1 0 0 0 0
1 1 0 0 0
1 1 1 0 0
1 1 1 1 0
1 0 1 1 1
"""

from __future__ import annotations

from anyflash.semantics.mask import Mask, as_mask, causal, dense, documents, prefix, tree, upper_left, window

__all__ = ["Mask", "as_mask", "causal", "dense", "documents", "prefix", "tree", "upper_left", "window"]
