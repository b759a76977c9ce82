"""A kernel of one partition that multiplies the keys of a cache, chunk by chunk and as a whole tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import (
    barrier_expect,
    barrier_init,
    barrier_wait,
    barriers,
    fence,
    recast,
    tma_load,
    tma_store,
    tma_store_wait,
    wgmma,
)
from anyflash.kernels.gluon.pages import fill_from_pages, make_page_ring
from anyflash.kernels.gluon.pipeline import await_full, release, tile_of
from anyflash.kernels.gluon.sequences import keys_of


@gluon.jit
def keys_times(
    q, k, out, seqused, seqlen_k, cache,
    PAGE: gl.constexpr, PADDED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out[b] = q . k_b^T, (64, keys), by tiles of BLOCK_N keys; program b has sequence b, of one head."""
    DIM: gl.constexpr = q.block_type.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    q_tile = gl.allocate_shared_memory(q.dtype, [64, DIM], q.layout)
    tile = gl.allocate_shared_memory(gl.float32, [64, BLOCK_N], out.layout)
    loaded = barriers(1)
    barrier_init(loaded.index(0), count=1)
    ring, boxes = make_page_ring(k, BLOCK_N, DIM, STAGES, 1)
    batch = gl.program_id(0)
    first_slot, k_len = keys_of(batch, seqused, seqlen_k, cache, True, PADDED)
    barrier_expect(loaded.index(0), q.block_type.nbytes)
    tma_load(q, [0, 0], loaded.index(0), q_tile)
    barrier_wait(loaded.index(0), 0)
    for n in range(gl.cdiv(seqlen_k, BLOCK_N)):
        fill_from_pages(
            ring, boxes, n, k, cache[4], cache, batch, 0, first_slot, n * BLOCK_N, k_len,
            PAGE, BLOCK_N, DIM, STAGES,
        )  # fmt: skip
        await_full(ring, n, STAGES)
        zero = gl.zeros([64, BLOCK_N], gl.float32, layout=LAYOUT)
        s = wgmma(q_tile, tile_of(ring, n, BLOCK_N, DIM, STAGES).permute((1, 0)), zero)
        release(ring, n, STAGES)
        tma_store_wait(0)
        tile.store(s)
        fence()
        tma_store(out, [batch * 64, n * BLOCK_N], tile)
    tma_store_wait(0)


@gluon.jit
def boxes_or_tile(q, k, whole, out, CHUNKED: gl.constexpr, BY_PANELS: gl.constexpr):
    """out = q . k^T for 64 keys: k loaded as one tile, or as chunks and panels, which lie BY_PANELS or,
    wrong, by chunks."""
    DIM: gl.constexpr = q.block_type.shape[1]
    ROWS: gl.constexpr = k.block_type.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    q_tile = gl.allocate_shared_memory(q.dtype, [64, DIM], q.layout)
    tile = gl.allocate_shared_memory(gl.float32, [64, 64], out.layout)
    loaded = barriers(1)
    barrier_init(loaded.index(0), count=1)
    barrier_expect(loaded.index(0), q.block_type.nbytes + whole.block_type.nbytes)
    tma_load(q, [0, 0], loaded.index(0), q_tile)
    if CHUNKED:
        boxes = gl.allocate_shared_memory(k.dtype, [DIM // 64 * (64 // ROWS), ROWS, 64], k.layout)
        for panel in gl.static_range(DIM // 64):
            for chunk in gl.static_range(64 // ROWS):
                if BY_PANELS:
                    place = panel * (64 // ROWS) + chunk
                else:
                    place = chunk * (DIM // 64) + panel
                tma_load(k, [chunk * ROWS, panel * 64], loaded.index(0), boxes.index(place))
        keys = recast(boxes, 1, 64, DIM).index(0)
    else:
        keys = gl.allocate_shared_memory(k.dtype, [64, DIM], whole.layout)
        tma_load(whole, [0, 0], loaded.index(0), keys)
    barrier_wait(loaded.index(0), 0)
    tile.store(wgmma(q_tile, keys.permute((1, 0)), gl.zeros([64, 64], gl.float32, layout=LAYOUT)))
    fence()
    tma_store(out, [0, 0], tile)
    tma_store_wait(0)
