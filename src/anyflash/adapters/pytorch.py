"""PyTorch's own attention: everything that calls `torch.nn.functional.scaled_dot_product_attention`.

    from anyflash.adapters import pytorch as anyflash_for_pytorch

    with anyflash_for_pytorch.use():
        loss = model(x)                 # nn.TransformerEncoder, nn.MultiheadAttention, your own F.sdpa calls

Inside the context (or between `install` and `remove`) that function is ours, in the whole process. The fused
inference path of nn.TransformerEncoderLayer, which bypasses it and forms the score matrix, is switched off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from anyflash import api
from anyflash.adapters.base import Target
from anyflash.core.log import logger
from anyflash.semantics.mask import Mask

if TYPE_CHECKING:
    import torch

name = "pytorch"
target = Target(
    package="torch",
    module="torch",
    minimum="2.13",
    below="2.14",
    how_to_install="pip install torch==2.13.0",
)

_own: tuple[Any, bool] | None = None


def install() -> None:
    """Put anyflash in the place of `scaled_dot_product_attention`. Raises ImportError if torch is absent."""
    global _own
    if _own is not None:
        return
    import torch

    target.warn_if_untested()
    functional = torch.nn.functional
    _own = functional.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    functional.scaled_dot_product_attention = scaled_dot_product_attention
    torch.backends.mha.set_fastpath_enabled(False)


def remove() -> None:
    """Put torch's own function and its fast path setting back."""
    global _own
    if _own is None:
        return
    import torch

    torch.nn.functional.scaled_dot_product_attention, fast_path = _own
    torch.backends.mha.set_fastpath_enabled(fast_path)
    _own = None


@contextmanager
def use() -> Iterator[None]:
    """`install` for the length of a `with` block. Inside an installed process it changes nothing."""
    outermost = _own is None
    install()
    try:
        yield
    finally:
        if outermost:
            remove()


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by `anyflash.attention`.

    query      (..., heads, q, head_dim); key, value (..., kv heads, k, dim); leading axes broadcast
    attn_mask  bool, True = attend, or additive; broadcastable to (..., heads, q, k)
    is_causal  key <= query row, both counted from 0: torch's upper-left convention; and-ed with a mask

    Returns (..., heads, q, value dim). Rows without a key are 0. What we have no form for (nested tensors,
    heads that torch would broadcast without `enable_gqa`) goes to torch's own function, and the log says so.
    """
    reason = _not_ours(query, key, value, attn_mask, enable_gqa)
    if reason is not None:
        logger.info("scaled_dot_product_attention left to torch: %s", reason)
        return _original()(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead = query.shape[:-3]
    q, k, v = (_to_four_axes(t) for t in (query, key, value))
    mask: Any = None
    bias: Any = None
    if attn_mask is not None:
        matrix = attn_mask if attn_mask.ndim <= 4 else attn_mask.flatten(0, -4)
        mask, bias = (matrix, None) if not matrix.is_floating_point() else (None, matrix)
    bottom_right = is_causal and q.shape[2] == k.shape[2]
    if is_causal and not bottom_right:
        upper_left = Mask(lambda at: at.k <= at.row)
        mask = upper_left if mask is None else upper_left & mask
    out = api.attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        causal=bottom_right,
        mask=mask,
        bias=bias,
        scale=scale,
        dropout_p=dropout_p,
    ).transpose(1, 2)
    if query.ndim == 4:
        return out
    return out[0] if query.ndim == 3 else out[0, 0] if query.ndim == 2 else out.unflatten(0, lead)


def _original() -> Any:
    if _own is not None:
        return _own[0]
    import torch

    return torch.nn.functional.scaled_dot_product_attention


def _to_four_axes(t: torch.Tensor) -> torch.Tensor:
    while t.ndim < 4:
        t = t[None]
    return t if t.ndim == 4 else t.flatten(0, -4)


def _not_ours(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    enable_gqa: bool,
) -> str | None:
    """Why torch's own function has to answer; None if ours can. Errors of a call are torch's to raise."""
    if any(t.is_nested or not t.is_floating_point() for t in (query, key, value)):
        return "nested or not floating point"
    if len({t.ndim for t in (query, key, value)}) != 1 or query.ndim < 2:
        return f"axes {query.ndim}, {key.ndim}, {value.ndim}"
    if query.shape[:-3] != key.shape[:-3] or query.shape[:-3] != value.shape[:-3]:
        return "leading axes to broadcast"
    if query.ndim > 2 and not (query.shape[-3] == key.shape[-3] == value.shape[-3]) and not enable_gqa:
        return "heads to broadcast"
    if attn_mask is not None and query.ndim > 4 and attn_mask.shape[:-3] != query.shape[:-3]:
        return "a mask to broadcast over more than one leading axis"
    return None


def self_check() -> str | None:
    """None if a tiny nn.TransformerEncoder agrees with torch's own attention; else what is wrong."""
    if target.installed() is None:
        return f"{target.package} is not installed: {target.how_to_install}"
    try:
        import torch
    except ImportError as error:
        return f"cannot import torch: {error}"
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True).double()
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        causal = torch.nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
        own = layer(x, src_mask=causal)
        with use():
            ours = layer(x, src_mask=causal)
    finally:
        torch.set_rng_state(state)
    difference = float((own - ours).detach().abs().max())
    bound = 64 * torch.finfo(torch.float64).eps * float(own.detach().abs().max())
    if not difference <= bound:
        return f"a tiny encoder differs from torch's attention by {difference:.1e}, rounding by {bound:.1e}"
    return None
