# mypy: disable-error-code="no-untyped-def"
# (the parameters of a Triton kernel are pointers and constants, which Python types do not describe)
"""The warp of `packed_product` that copies steps of x, of packed words and, turned, of scales into the rings.

It fills a place as soon as the warps that multiply have left it, whatever tile or item comes next, and so they find the
next tile's first steps there.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from . import packed_scales
from .launching import next_place
from .packed_sums import corner, item_of


@gluon.jit
def produce(
    copied, FORMAT: gl.constexpr, GROUP: gl.constexpr, TURNED: gl.constexpr, GROUPED: gl.constexpr, SPLIT: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """All steps of every item of this program, in order."""
    x_tiles, x_short_tiles, word_tiles, scales, table, x_ring, word_ring, scale_ring, full, empty, sizes = copied
    rows, items, bands, tiles, steps, uncut, pieces, N, K = sizes
    STAGES: gl.constexpr = full.shape[0]
    IN_PLACE: gl.constexpr = x_ring.shape[0] // STAGES
    BLOCK: gl.constexpr = x_tiles.block_shape[0]
    SHORT: gl.constexpr = x_short_tiles.block_shape[0]
    STEP: gl.constexpr = x_tiles.block_shape[1]
    PER: gl.constexpr = 4 if FORMAT == "fp8" else 8  # elements in a word
    OUTS: gl.constexpr = word_tiles.block_shape[1] * PER if TURNED else word_tiles.block_shape[0]
    place, phase = 0, 0
    if EARLY:
        gdc_wait()
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        expert, row, end, tile, after, begin, until = item_of(
            item, table, rows, bands, tiles, steps, uncut, pieces, BLOCK, IN_PLACE, GROUPED, SPLIT
        )
        if expert < 0:
            after = tile
        for each in range(tile, after):
            high, column = corner(expert, each, N, OUTS, TURNED)
            if SPLIT:
                begin_here, until_here = max(begin - each * steps, 0), min(until - each * steps, steps)
            else:
                begin_here, until_here = begin, until
            for step in range(begin_here, until_here):
                here = full.index(place)
                mbarrier.wait(empty.index(place), phase ^ 1)
                short = SHORT < BLOCK and end - row <= SHORT
                if short:
                    mbarrier.expect(here, IN_PLACE * (x_short_tiles.block_type.nbytes + word_tiles.block_type.nbytes))
                else:
                    mbarrier.expect(here, IN_PLACE * (x_tiles.block_type.nbytes + word_tiles.block_type.nbytes))
                for i in gl.static_range(IN_PLACE):
                    k = (step * IN_PLACE + i) * STEP
                    at = place * IN_PLACE + i
                    if short:
                        x_short = x_ring.index(at).slice(0, SHORT, dim=0)
                        tma.async_copy_global_to_shared(x_short_tiles, [row, k], here, x_short)
                    else:
                        tma.async_copy_global_to_shared(x_tiles, [row, k], here, x_ring.index(at))
                    words = word_ring.index(at)
                    if TURNED:
                        tma.async_copy_global_to_shared(word_tiles, [high + k, column // PER], here, words)
                        if FORMAT != "fp8":
                            packed_scales.copy(scales, scale_ring.index(at), high + k, column, K, GROUP)
                    else:
                        tma.async_copy_global_to_shared(word_tiles, [high, k // PER], here, words)
                if TURNED and FORMAT != "fp8":
                    async_copy.mbarrier_arrive(here, increment_count=False)
                place, phase = next_place(place, phase, STAGES)
