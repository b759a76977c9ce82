"""The arrays of one call as views, in canonical axes: what `describe` gives a backend beside the Problem.

Nothing changes one of these once it is made. They are not declared frozen because that makes construction
several times slower, and they are made for every call.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyflash.core.view import View


@dataclass(slots=True)
class Operands:
    """Inputs. q, k, v are (batch, tokens, heads, dim), or (tokens, heads, dim) packed.

    In a paged problem k and v are (pages, page_size, heads_kv, dim), and key j of sequence b, 0 <= j <
    seqused_k[b], lies at slot s = j + leftpad_k[b]: row s % page_size of page block_table[b, s // page_size].

    cu_seqlens_*  (batch + 1,) int32; of q also in a paged problem whose q is packed
    seqused_k     (batch,) int32, how many keys exist; always there in a paged problem
    block_table   (batch, pages of a sequence) int32, C-contiguous; every entry is a page's number, also those
                  that hold no key of the sequence
    leftpad_k     (batch,) int32, or None for zeros
    longest_k     the greatest of seqused_k in a paged problem

    That is so in host memory, where their values were read and checked. On a device they are the user's own
    arrays and nobody has looked into them: int32 or int64, any strides, any values. A kernel holds starts and
    lengths inside the arrays, and looks only at entries of the page table that hold a key, each held inside
    the cache. In a paged problem there

    seqused_k     counts the new keys, without the left padding; None until `Backend.append` says it
    block_table   None means that sequence b is page b
    longest_k     the slots of a sequence, and not more than problem.seqlen_k
    """

    q: View
    k: View
    v: View
    tables: tuple[View, ...] = ()
    sinks: View | None = None
    cu_seqlens_q: View | None = None
    cu_seqlens_k: View | None = None
    seqused_k: View | None = None
    seed: int = 0
    block_table: View | None = None
    leftpad_k: View | None = None
    longest_k: int = 0


@dataclass(slots=True)
class Results:
    """Outputs of a forward, allocated by the frontend and written by the backend.

    `stats` (2, *lse_shape), in the accumulator's type, keeps each row's maximum and the logarithm of its
    sum apart, in units that are the backend's own. Its backward reads it, because lse alone rounds the sum
    away where scores are huge.
    """

    out: View
    lse: View
    stats: View


@dataclass(slots=True)
class Saved:
    """What the backward needs of the forward, and the incoming gradients. `dlse` None means zero."""

    out: View
    stats: View
    dout: View
    dlse: View | None = None


@dataclass(slots=True)
class Gradients:
    """Outputs of a backward.

    `tables[i]` is None where no gradient is wanted; others are written whole, in the accumulator's type. dq,
    dk, dv have the dtype of q.
    """

    dq: View
    dk: View
    dv: View
    tables: tuple[View | None, ...] = ()
    dsinks: View | None = None
