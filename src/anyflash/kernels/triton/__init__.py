"""Portable GPU kernels: one source for NVIDIA and AMD, compiled by Triton.

    expressions.py   score and mask expressions as Triton source
    bounds.py        tile classes as Triton source, by the interval rules of semantics
    program.py       a Problem's device functions: generated, decorated, kept
    elementary.py    what generated source calls: floor division, tanh, table look-ups
    tiles.py         loads, stores and products of tiles whose width is a power of two and a rest
    dropout.py       the random numbers of semantics/rng.py for a tile
    forward.py       out, lse, stats
    prepare.py       delta of a row, and the sinks' gradient
    backward.py      dK and dV, then dQ
    tables.py        gradients of biases, whose elements a tile owns
    scattered.py     gradients of tables that are read at other places
    slopes.py        what a pair adds to either
    decode.py        attention over a cache, and of few queries over many keys: split over keys
    walk.py          its walk over keys
    pages.py         where keys lie
    combine.py       partial sums, kept and added up
    workspace.py     counters that a launch finds and leaves at zero
    schedule.py      tile sizes, warps and stages by device and head_dim
    tuned.py         tiles that were tuned on a device
    precision.py     how float32 is multiplied
    offline.py       what a call would launch on a device that is not here, compiled
    launch.py        views to launches; launch_backward.py those of the backward, launch_decode.py of decode
    interpreter.py   what makes Triton's interpreter right for bfloat16

Every kernel states its math, its tiles and its registers. Rules for all: no atomics on floats, save on those
that are infinite or NaN; no block pointers; no autotuning; bfloat16 only in load, store, trans, where and dot
(the interpreter computes nothing else in it); addresses in 64 bits.
"""
