"""The online softmax of a block of rows, and what lets it run under a product.

    state   m   greatest score so far, in the unit of s
            l   sum of 2 ** ((s - m) unit)
    step    p = 2 ** ((s - m) unit),  l = l shrink + sum p,  shrink = 2 ** ((old m - m) unit)

Scores are subtracted before they are multiplied, although one multiply-add could do both: where scores are
huge m unit rounds by more than an exponent can bear, and s - m does not. stats are those of
kernels/triton/forward.py: m, and log2 l.

Overlap. Between the wait for S and the wait for the product before it, the tensor cores work; the softmax
belongs there. ptxas moves all of it below the second wait unless a basic block ends between the two: hence
`pin(p)` and a wait on a barrier whose phase has ended already. tests/gpu counts the exponentials there:
KEYS * 64 / 128 + 2 a thread, p and shrink.

Registers, in words a thread: s and p share KEYS / 2, state 4, p as an operand KEYS / 4.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def start(sinks, head, unit, SINKS: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """The state before the first key. A sink is a key that has been seen."""
    m = gl.full([ROWS], float("-inf"), gl.float32, layout=LAYOUT)
    l = gl.zeros([ROWS], gl.float32, layout=LAYOUT)
    if SINKS:
        logit = gl.load(sinks + head).to(gl.float32)
        m = gl.zeros([ROWS], gl.float32, layout=LAYOUT) + logit * (1.4426950408889634 / unit)
        l += gl.where(m == float("-inf"), 0.0, 1.0)
    return m, l


@gluon.jit
def step(s, state, unit, LIFT: gl.constexpr = 0):
    """p (not rounded yet), the new state, and by what earlier sums shrink. LIFT: p and l are 2 ** LIFT times
    as large, that of `state` too."""
    m, l = state
    new_m = gl.maximum(m, gl.max(s, 1))
    # A row that has seen nothing yet has m = -inf, and -inf - -inf is no number.
    base = gl.where(new_m == float("-inf"), 0.0, new_m)
    shrink = gl.exp2((m - base) * unit)
    exponent = (s - gl.expand_dims(base, 1)) * unit
    if LIFT != 0:
        exponent += LIFT
    p = gl.exp2(exponent)
    return p, (new_m, l * shrink + gl.sum(p, 1)), shrink


@gluon.jit
def settled(state, unit):
    """lse (natural), the two planes of stats, and 1 / l (1 if l is 0)."""
    m, l = state
    total = gl.where(l == 0.0, 1.0, l)
    log_sum = gl.log2(total)
    lse = gl.where(m == float("-inf"), m, (m * unit + log_sum) * 0.6931471805599453)
    return lse, m, log_sum, 1.0 / total
