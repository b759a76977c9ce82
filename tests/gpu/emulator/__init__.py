"""An emulator of warp-specialised Gluon kernels for Hopper, on CPU tensors: what their tests run.

    emulate(kernel, grid, *arguments, seed=0, **constants)

runs the unmodified functions of a `gluon.jit` kernel, one partition at a time, in an order and with moments
of completion that follow from the seed alone. Nine seeds in a row try nine policies (`scheduler.Policy`). A
kernel that breaks a rule raises an error of `errors` that names buffer, stage, partition and line:

    Race, MissingFence      accesses to shared memory that nothing orders, or orders without a proxy fence
    Deadlock                at once, with what everybody waits for
    BarrierMisuse           arrivals, bytes and phases that do not fit
    InFlight                results used too early, partitions that end too early
    Mismatch                shapes, types, layouts, warps that Gluon refuses
    OutOfBounds             addresses outside a tensor, integers past their bits
    Unknown                 what is not modelled

    file            models
    translate       which names of a kernel are replaced, and by what
    launch          arguments, programs of the grid
    scheduler       partitions, policies, events; machine: the one launch that runs
    clocks          what has happened before what
    memory          shared memory: races, fences;  device_memory, regions: global memory
    swizzle         where bytes of a tile lie, where a buffer is seen in two layouts
    publication     what programs know of each other's stores
    barriers        mbarriers and named barriers
    tma, wgmma      asynchronous copies and products
    tensor, dtypes, language    values, and Gluon's functions of them
    mutations       broken kernels, made by dropping one call at a time
    source          lines and names in messages

It works as well where Triton's interpreter is on, so a call may mix emulated and interpreted kernels. Kernels
reach TMA, barriers, wgmma and fences by Gluon's own names or by those of `kernels/gluon/hopper.py`.

A race is found whatever the schedule, as long as the two accesses are made in some run: order is followed by
vector clocks along mbarriers, named barriers, and starts and ends of partitions.

Not modelled, so that a fault of this kind is not seen:
- a partition is one thread: warps of one partition that run apart (Triton brings them together before an
  arrival or a copy, as test_emulator_agrees.py checks of one kernel);
- registers, spills, `setmaxnreg` beyond the range of its number, speed;
- layouts beyond equality and the number of warps: which thread holds what, swizzles but of a buffer that is
  reinterpreted, bank conflicts, slices of shared memory across a swizzle; results of `reshape`, `permute`,
  `join`, `split` have no layout;
- reads by threads before TMA overwrites (write after read across proxies): PTX wants a fence there too, and
  practice is to rely on the barrier's release;
- a register operand of wgmma in flight: values never change here; the compiler must keep them;
- order through global memory: values, bounds, stores of one element by two programs, and loads of what
  another program's threads have stored (`publication`) are checked there, nothing else; what TMA writes may
  come late, after the wait for its reads;
- `barrier_wait` whose only aim is order, not safety (ping-pong): without it nothing goes wrong but speed;
- clusters, multicast, im2col, gather and scatter, cp.async, tf32, unsigned integers;
- sums of a product are rounded once, those of the hardware in its own way (but for `wgmma.SUM_BITS`).
"""

from __future__ import annotations

from gpu.emulator.launch import emulate

__all__ = ["emulate"]
