"""Several heads of a group in one tile: its rows are pairs of a token and a member.

    row r of 64 = token r // MEMBERS of the tile, and member r % MEMBERS of the MEMBERS heads

Short sequences fill tiles of one head badly, and every head of a group reads the same keys. To TMA members
are an axis of their own, between tokens and columns: a box of 64 / MEMBERS tokens and MEMBERS heads lies in
shared memory as 64 rows, and ends with the sequence as any other. So MEMBERS is a power of two that divides
the group. Where the forward else has a head, it has the number of such a bundle of MEMBERS heads then, and
its rows are tokens.

A class of tiles holds for all heads of a tile or none: masks that read the head are not for this.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def pairs(first_token, head, MEMBERS: gl.constexpr, LAYOUT: gl.constexpr):
    """The token and the head of 64 rows, (64,) in LAYOUT."""
    rows = gl.arange(0, 64, layout=LAYOUT)
    return first_token + rows // MEMBERS, head * MEMBERS + rows % MEMBERS


@gluon.jit
def heads_of(head, MEMBERS: gl.constexpr, LAYOUT: gl.constexpr):
    """The head of all rows, or of each."""
    if MEMBERS > 1:
        token, head = pairs(0, head, MEMBERS, LAYOUT)
    return head


@gluon.jit
def report(odd, broken, planes, block, blocks, there, MEMBERS: gl.constexpr):
    """Whether sums of a tile came out infinite or NaN, to each of its heads. A head, of the `planes` (64,) of
    all rows, has `blocks` tiles of 64 / MEMBERS tokens, the last one first."""
    member = gl.arange(0, 64, layout=planes.type.layout)
    mine = (member < MEMBERS) & there
    gl.store(odd + planes * blocks + (blocks - 1 - block), broken + member * 0, mask=mine)
