"""Attention for Hopper (sm_90) in Gluon: warp-specialised kernels, compiled by Triton 3.6 to 3.9.

    hopper.py        TMA, barriers, wgmma: the only module that knows Gluon's versions
    pipeline.py      rings of shared-memory stages, and the turns of ping-pong
    sequences.py     work items, where their rows and keys lie, coordinates of TMA boxes
    pages.py         keys of a cache, loaded by pages;  launch_pages.py: what it is given
    versions.py      which versions of Triton
    assembler.py     which versions of ptxas
    pieces.py        heads of 96 and 192 columns as two powers of two
    elementary.py    what generated source calls, in this dialect
    mask.py          runs of key tiles of one class; scores with program and mask
    softmax.py       one online step
    dropout.py       which probabilities stay
    heads.py         several heads of a group in one tile
    forward.py       the walk: products and softmax in step
    results.py       out, lse, stats
    forward_fp8.py   the same walk for 8-bit floats;  transpose.py: v turned in shared memory for it
    decode.py        few rows, all heads of a group together, over keys that are split between programs
    segments.py      sums of parts of a sequence's keys: kept, counted, added up
    schedule.py      tiles, stages, consumers and registers by head_dim; shared memory, order of work
    launch.py        views to descriptors and launches
    backward.py      dk and dv of a block of keys, and with REDUCE its part of dq
    backward_wide.py dk and dv of head dims above 128: columns shared out
    keys.py          what these two share: the producer, rings, results
    backward_dq.py   dq of a block of rows, in one order
    finish.py        dq from float32 sums
    rows.py          runs of row tiles of one class
    schedule_fp8.py, launch_fp8.py, schedule_decode.py, launch_decode.py, schedule_backward.py,
    launch_backward.py    as their names say

A kernel is one block of threads whose warpgroups have parts: a producer (one warp) moves tiles by TMA into
rings, consumers multiply and address global memory for neither k nor v, and for q in decode.py alone. Score
programs and masks are device functions that `kernels/triton/program.py` writes, here in Gluon's dialect.

Rules: operations of hopper.py are reached by its names only, imported one by one, because tests replace
exactly those; every shape is a power of two; a head_dim is rounded up to 64, 96, 128, 192 or 256 (that of dk
and dv, and where keys are split, to 64, 128 or 256) and TMA fills the rest with zeros; rows past the end of a
sequence are zeros too, never another sequence's; counters number the uses of ring stages, so that a barrier's
phase goes on from one work item to the next.

None of it has run on a GPU yet.
"""
