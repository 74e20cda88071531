"""What the decode product of whole rows promises; run by test_fast_paths.py as fast_suite.py is."""

from __future__ import annotations

import itertools
from dataclasses import replace

from fast_suite import weight
from orbit_kernels import FORMATS, quantize, set_batch_invariant
from orbit_kernels.fast.decode import in_whole_rows
from orbit_kernels.fast.decode_order import Order, begins, last
from orbit_kernels.fast.decode_rows import MOST, share

OUTS = [9728, 2560, 4096, 7168, 2048, 16, 2112, 16896]


def test_programs_have_every_group_of_rows_and_none_has_too_many():
    for out in OUTS:
        for tokens, kind in itertools.product(range(1, 17), ("int4", "mxfp4", "nvfp4-divide", "fp8")):
            chosen, groups = share(out, tokens, kind), out // 16
            assert 1 <= chosen.groups <= min(groups, MOST)
            starts = [at * (groups - chosen.groups) // max(chosen.programs - 1, 1) for at in range(chosen.programs)]
            taken = {start + i for start in starts for i in range(chosen.groups)}
            assert taken == set(range(groups))


def test_every_pair_has_its_turn_and_a_group_takes_its_columns_in_order():
    for groups, chunks in itertools.product(range(1, MOST + 1), (1, 3, 10)):
        order = Order(groups, chunks, 2)
        places = [order.place(pair) for pair in range(order.pairs)]
        assert {place[:2] for place in places} == {(c, g) for c in range(chunks) for g in range(groups)}
        assert [pair for pair in range(order.pairs) if begins(pair, order)] == list(range(0, order.pairs, groups))
        for chunk, group, before in places:
            assert places[before][:2] == (chunk - 1, group) if chunk else before == -1
        assert [places[last(group, order)][:2] for group in range(groups)] == [(chunks - 1, g) for g in range(groups)]


def test_a_product_goes_there_only_where_rows_may_change_their_bits_and_it_is_measured_faster(fast_mode):
    packed, small = (quantize(weight(out, 2048), FORMATS["mxfp4"]) for out in (2048, 1024))
    assert in_whole_rows(packed, 1) and in_whole_rows(packed, 8)
    assert not in_whole_rows(packed, 17) and not in_whole_rows(small, 1)
    assert not in_whole_rows(quantize(weight(2048, 256), FORMATS["mxfp4"]), 1)
    octets, long = (quantize(weight(2048, width), FORMATS["fp8"]) for width in (2048, 7680))
    assert in_whole_rows(octets, 16) and not in_whole_rows(octets, 17)
    assert in_whole_rows(long, 8) and not in_whole_rows(long, 9)
    finer = {key: t if key == "weight" else t.repeat_interleave(2, 0) for key, t in octets.tensors.items()}
    assert not in_whole_rows(replace(octets, tensors=finer, block=(64, 128)), 1)
    set_batch_invariant(True)
    assert not in_whole_rows(packed, 1)
