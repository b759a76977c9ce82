"""The online softmax of a block of rows, and what lets it run under a product.

    state   m      greatest score so far, in the unit of s
            base   m unit, rounded, or 0 while m is -inf: what exponents are taken relative to
            l      sum of 2 ** (s unit - base)
    step    p = 2 ** (s unit - base),  l = l shrink + sum p,  shrink = 2 ** (old base - base)

s unit - base is one multiply-add, exact but for its last rounding, and `base` is the same number in every
exponent: a rounded product cancels whatever the size of the scores. `pin` keeps the compiler from contracting
old base - m unit, which would use another number. What rounding took from m unit is given back once, in
`settled`, so that stats are those of kernels/triton/forward.py: m, and log2 of the sum relative to m unit.

Overlap. Between the wait for S and the wait for the product before it, the tensor cores work; the softmax
belongs there. ptxas moves all of it below the second wait unless a basic block ends between the two: hence
`pin(p)` and a wait on a barrier whose phase has ended already. tests/gpu counts the exponentials there:
KEYS * 64 / 128 + 2 a thread, p and shrink.

Registers, in words a thread: s and p share KEYS / 2, state 6, p as an operand KEYS / 4.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import pin


@gluon.jit
def start(sinks, head, unit, SINKS: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """The state before the first key. A sink is a key that has been seen."""
    m = gl.full([ROWS], float("-inf"), gl.float32, layout=LAYOUT)
    base = gl.zeros([ROWS], gl.float32, layout=LAYOUT)
    l = gl.zeros([ROWS], gl.float32, layout=LAYOUT)
    if SINKS:
        logit = gl.load(sinks + head).to(gl.float32)
        m = gl.zeros([ROWS], gl.float32, layout=LAYOUT) + logit * (1.4426950408889634 / unit)
        base = pin(gl.where(m == float("-inf"), 0.0, m * unit))
        l += gl.where(m == float("-inf"), 0.0, 1.0)
    return m, base, l


@gluon.jit
def step(s, state, unit):
    """p (not rounded yet), the new state, and by what earlier sums shrink."""
    m, base, l = state
    new_m = gl.maximum(m, gl.max(s, 1))
    # A row that has seen nothing yet has m = -inf, and -inf - -inf is no number.
    new_base = pin(gl.where(new_m == float("-inf"), 0.0, new_m * unit))
    shrink = gl.where(m == float("-inf"), 0.0, gl.exp2(base - new_base))
    p = gl.exp2(s * unit - gl.expand_dims(new_base, 1))
    return p, (new_m, new_base, l * shrink + gl.sum(p, 1)), shrink


@gluon.jit
def settled(state, unit):
    """lse (natural), the two planes of stats, and 1 / l (1 if l is 0)."""
    m, base, l = state
    total = gl.where(l == 0.0, 1.0, l)
    taken = gl.where(m == float("-inf"), 0.0, gl.fma(m, gl.full_like(m, 0.0) + unit, -base))
    log_sum = gl.log2(total)
    lse = gl.where(m == float("-inf"), m, (base + log_sum) * 0.6931471805599453)
    return lse, m, log_sum - taken, 1.0 / total
