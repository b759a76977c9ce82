"""Every difference between the conventions of flash_attn and ours: one table and the functions.

`DIFFERENCES` is the whole list; each row has an exact test of its own in tests/compat/test_mapping.py. What
is not listed is the same in both: the axes of q, k and v, bottom-right causal masks, windows with both ends
included, the default scale, natural logarithms, and which key head a query head reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Window = tuple[int | None, int | None] | None
Mask = Callable[[Any], Any] | None


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference of convention. `where` lists generations: 1, 2, 3 (flash_attn_interface), 4
    (flash_attn.cute), "triton"."""

    name: str
    where: tuple[int | str, ...]
    theirs: str
    ours: str


DIFFERENCES = (
    Difference("no window", (2, 3), "window_size side below 0 has no bound", "None has no bound"),
    Difference(
        "offset window",
        (4,),
        "None has no bound; a negative side is an offset; sides of a sum below 0 mean no window at all",
        "a side is at least 0; the same offsets as a mask",
    ),
    Difference("causal in version 1", (1, "triton"), "key <= row: aligned at the top left", "bottom right"),
    Difference("no softcap", (2, 3, 4), "softcap=0.0", "softcap=None"),
    Difference("scale with qv", (3, 4), "(D + Dv) ** -0.5, scores q . k + qv . v", "one product of D + Dv"),
    Difference("lse of a row without keys", (2,), "+inf", "-inf"),
    Difference(
        "lse with ALiBi",
        (2,),
        "where the window is just causal, the bias is slope * key: greater by slope * position",
        "the bias is -slope * |position - key|",
    ),
    Difference("lse in version 1", (1,), "(batch, heads, longest q), padded", "(heads, total q)"),
    Difference(
        "probabilities",
        (1, 2),
        "S_dmask, padded to multiples of 128, negative where dropped; empty without dropout",
        "never in memory: computed for this, in pieces",
    ),
    Difference(
        "random state",
        (2,),
        "rng_state int64 (2,): seed and offset of Philox, from the generator of the device",
        "a seed below 2 ** 63 from torch's CPU generator; rng_state is (seed, 0)",
    ),
    Difference(
        "chance of dropout",
        (1, 2),
        "a byte is compared: kept with chance (floor(255 * (1 - p)) + 1) / 256",
        "a 32-bit word is compared: kept with chance 1 - p",
    ),
    Difference("softmax_d", (2,), "rowsum(dout * out), rows padded to a multiple of 128", "inside a kernel"),
    Difference("longest lengths", (1, 2, 3, 4), "max_seqlen_* size the launch", "read off cu_seqlens"),
    Difference(
        "used rows",
        (3, 4),
        "seqused_q: rows behind it are not written",
        "sequences are as long as they are: rows behind it get 0",
    ),
    Difference("left padding", (2,), "leftpad_k: keys before it do not exist", "packed without them"),
    Difference("pages", (2, 3, 4), "block_table, page_table: keys lie in pages", "packed from them"),
    Difference("chunks", (3,), "attention_chunk: keys of the query's own chunk", "a mask"),
    Difference(
        "8-bit floats",
        (3,),
        "q_descale, k_descale, v_descale (B, Hk), for all dtypes but heeded for fp8 alone; bfloat16 results",
        'descale_q, descale_k, descale_v, for 8-bit floats alone; "fnuz" formats become float32',
    ),
    Difference("sink", (4,), "learnable_sink", "sinks"),
    Difference(
        "modifications",
        (4,),
        "score_mod, mask_mod: called with the row's number; mask_mod switches causal and window off",
        "score, mask: called once with symbols; masks are and-ed",
    ),
    Difference("what is returned", (4,), "always (out, lse)", "lse on request"),
    Difference("bias", ("triton",), "no gradient of the bias", "a gradient where one is required"),
    Difference(
        "gradient of lse",
        (2, 3),
        "dropped without a word",
        "given: lse is differentiable",
    ),
    Difference(
        "determinism",
        (1, 2, 3, 4),
        "deterministic=True asks for it",
        "the same on Hopper GPUs, where torch.use_deterministic_algorithms asks for it too; always elsewhere",
    ),
    Difference(
        "hints of speed",
        (2, 3, 4),
        "num_splits, pack_gqa, sm_margin, scheduler_metadata, zero_tensors and the like: same results",
        "not needed",
    ),
)


def in_order(deterministic: bool) -> bool:
    """Must gradients be summed in one order? A process may ask for it, too."""
    return bool(deterministic) or torch.are_deterministic_algorithms_enabled()


def window(window_size: Sequence[int | None]) -> Window:
    """Of generations 2 and 3: any negative side has no bound."""
    left, right = (None if side is None or side < 0 else int(side) for side in window_size)
    return None if left is None and right is None else (left, right)


def softcap(value: float) -> float | None:
    return None if value == 0.0 else value


def offset_window(causal: bool, window_size: Sequence[int | None]) -> tuple[bool, Window, Mask]:
    """Of generation 4: (causal, window, mask) of ours that together allow the same keys."""
    left, right = window_size
    right = 0 if causal else right
    if left is not None and right is not None and left + right < 0:
        if not causal and (left, right) != (-1, -1):
            warnings.warn(
                f"window_size=({left}, {right}): in flash_attn.cute sides that add up to less than 0 mean no "
                "window, and so they do here; a side without bound is None there, not -1",
                stacklevel=4,
            )
        return causal, None, None
    if left is None and right is None:
        return causal, None, None
    if (left is None or left >= 0) and (right is None or right >= 0):
        return causal, (left, right), None

    def shifted(at: Any) -> Any:
        after = None if left is None else at.q - left <= at.k
        before = None if right is None else at.k <= at.q + right
        if after is None or before is None:
            return before if after is None else after
        return after & before

    return causal, None, shifted


def lse_of_empty_rows(lse: Tensor) -> Tensor:
    """Rows that see no key have lse +inf in generation 2."""
    return torch.where(lse == -torch.inf, torch.inf, lse)


def alibi_is_shifted(causal: bool, sides: Window, longest_k: int) -> bool:
    """Whether generation 2 would run its causal kernel, whose ALiBi adds slope * key."""
    left, right = sides or (None, None)
    return (causal or right == 0) and (left is None or left >= longest_k)


def alibi_shift(slopes: Tensor, positions: Tensor, batch: Tensor | None = None) -> Tensor:
    """What the causal kernel's lse has more than the formula's: slope * position.

    slopes (H,) or (B, H); positions (Tq,) of a dense call, or (total,) with `batch`, each token's sequence.
    Returns (1 or B, H, Tq), or (H, total).
    """
    if batch is None:
        return slopes.reshape(-1, slopes.shape[-1], 1) * positions
    per_token = slopes[batch] if slopes.ndim == 2 else slopes.expand(len(batch), -1)
    return per_token.T * positions


def positions(cu_seqlens_q: Tensor, k_lens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(key position, number of its sequence) of each packed query, (total,) both."""
    starts = cu_seqlens_q.long()
    token = torch.arange(total, device=starts.device)
    batch = torch.searchsorted(starts[1:], token, right=True).clamp_max(max(len(starts) - 2, 0))
    q_lens = starts.diff()
    return token - starts[batch] + (k_lens.long() - q_lens)[batch], batch


def padded_lse(lse: Tensor, cu_seqlens_q: Tensor, longest: int) -> Tensor:
    """(heads, total) as (batch, heads, longest); what no row fills is +inf."""
    lens = cu_seqlens_q.long().diff()
    row = torch.arange(longest, device=lse.device)
    token = (cu_seqlens_q[:-1].long()[:, None] + row).clamp_max(max(lse.shape[1] - 1, 0))
    picked = lse[:, token].transpose(0, 1)
    return picked.masked_fill((row >= lens[:, None])[:, None], torch.inf)


def round_up(length: int, multiple: int = 128) -> int:
    return -(-length // multiple) * multiple


def chunked(size: int) -> Callable[[Any], Any]:
    """Keys of the query's own chunk of `size` positions."""
    return lambda at: at.q // size == at.k // size


def join(*masks: Mask) -> Mask:
    """Masks of ours, and-ed; None allows all."""
    given = [mask for mask in masks if mask is not None]
    if len(given) < 2:
        return given[0] if given else None

    def both(at: Any) -> Any:
        allowed = given[0](at)
        for mask in given[1:]:
            allowed = allowed & mask(at)
        return allowed

    return both


FLOAT8 = tuple(
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
)

# Those that anyflash.attention takes.
OWN_FLOAT8 = FLOAT8[:2]


def widened(x: Tensor, descale: Tensor | None, group: int = 1, starts: Tensor | None = None) -> Tensor:
    """An 8-bit array (..., tokens, heads, D) as float32, times its factor for (batch, key head).

    `group` query heads share a key head's factor. `starts` says where the sequences of a packed array begin.
    """
    wide = x.to(torch.float32)
    if descale is None:
        return wide
    factors = descale.to(torch.float32).repeat_interleave(group, dim=-1)
    if starts is None:
        return wide * factors[:, None, :, None]
    _, sequence = positions(starts, starts.diff(), x.shape[0])
    return wide * factors[sequence, :, None]
