"""What the decode product of whole rows promises; run by test_fast_paths.py as fast_suite.py is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from fast_suite import DEVICE, FLOAT, error, modelopt, on_gpu, weight
from orbit_kernels import FORMATS, FormatSpec, linear, oft_linear, quantize, set_batch_invariant
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast.decode import decode, in_whole_rows
from orbit_kernels.fast.decode_order import Order
from orbit_kernels.fast.decode_rows import MOST, decode_rows, share, supports

SPECS = [FORMATS["int4"], FormatSpec("int4", 128), FORMATS["mxfp4"], FORMATS["nvfp4"]]
by_format = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.group_size}")
SHAPES = [(9728, 2560), (2560, 9728), (4096, 2560), (7168, 2048), (2048, 7168), (16, 512), (2112, 512), (16896, 1024)]


@pytest.fixture
def fast_mode():
    set_batch_invariant(False)
    yield
    set_batch_invariant(True)


def test_programs_have_every_group_of_rows_and_none_has_too_many():
    for out, width in SHAPES:
        for tokens, kind in itertools.product(range(1, 17), ("int4", "mxfp4", "nvfp4-divide")):
            chosen, groups = share(out, width, tokens, kind), out // 16
            assert 1 <= chosen.groups <= min(groups, MOST)
            starts = [at * (groups - chosen.groups) // max(chosen.programs - 1, 1) for at in range(chosen.programs)]
            taken = {start + i for start in starts for i in range(chosen.groups)}
            assert taken == set(range(groups))


@pytest.mark.parametrize("keep", [False, True])
def test_every_pair_has_its_turn_and_a_group_takes_its_columns_in_order(keep):
    for groups in range(1, MOST + 1):
        for chunks in (1, 3, 10):
            for band in range(1, groups + 1):
                order = Order(groups, chunks, band, 2, keep)
                places = [order.place(pair) for pair in range(order.pairs)]
                assert {place[:2] for place in places} == {(c, g) for c in range(chunks) for g in range(groups)}
                assert {place[3] for place in places} == set(range(order.visits))
                for chunk, group, before, visit in places:
                    assert visit % chunks == chunk
                    assert places[before][:2] == (chunk - 1, group) if chunk else before == -1


def test_a_product_goes_there_only_where_rows_may_change_their_bits_and_it_is_measured_faster(fast_mode):
    packed, small = (quantize(weight(out, 2048), FORMATS["mxfp4"]) for out in (2048, 1024))
    assert in_whole_rows(packed, 1) and in_whole_rows(packed, 8)
    assert not in_whole_rows(packed, 17) and not in_whole_rows(small, 1)
    assert not in_whole_rows(quantize(weight(2048, 256), FORMATS["mxfp4"]), 1)
    set_batch_invariant(True)
    assert not in_whole_rows(packed, 1)


@on_gpu
@by_format
@pytest.mark.parametrize("shape", [(16, 512), (208, 1024), (2128, 1536), (7168, 2048), (2048, 7168), (16896, 512)])
def test_any_shape_is_shared_out_and_a_row_has_the_same_bits_for_every_number_of_tokens(spec, shape):
    packed = quantize(weight(*shape), spec)
    assert supports(packed)
    x, bias = torch.randn(16, shape[1], device=DEVICE, dtype=FLOAT), torch.randn(shape[0], device=DEVICE, dtype=FLOAT)
    dense = reference_dequantize(packed)
    exact = x.double() @ dense.double().T + bias.double()
    whole = decode_rows(x, packed, bias)
    assert error(whole, exact) <= 1.02 * error(torch.nn.functional.linear(x, dense, bias), exact)
    for tokens in range(1, 17):
        for _ in range(2):  # read late, read early
            assert torch.equal(decode_rows(x[:tokens].contiguous(), packed, bias), whole[:tokens])


@on_gpu
@by_format
def test_unit_vectors_give_the_bits_of_the_dequantised_weight(spec):
    packed = quantize(torch.randn(256, 1536, device=DEVICE) * torch.logspace(-6, 3, 1536, device=DEVICE), spec)
    next(tensor for tensor in packed.tensors.values() if tensor.shape[0] == 256).view(torch.uint8).random_(0, 256)
    for one in (packed, modelopt(packed)) if spec.name == "nvfp4" else (packed,):
        columns = torch.eye(1536, device=DEVICE, dtype=FLOAT).split(16)
        assert torch.equal(torch.cat([decode_rows(part, one) for part in columns]).T, reference_dequantize(one))


@on_gpu
@by_format
def test_tensors_may_begin_anywhere(spec):
    packed = quantize(weight(256, 512), spec)
    x = torch.randn(3, 512, device=DEVICE, dtype=FLOAT)
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(3, 512)
    words = packed.tensors["weight_packed"]
    shifted = torch.cat([words.new_zeros(1), words.flatten()])[1:].view(words.shape)
    moved = replace(packed, tensors=packed.tensors | {"weight_packed": shifted})
    for _ in range(3):
        assert torch.equal(decode_rows(odd, moved), decode_rows(x, packed))


@on_gpu
@by_format
def test_a_weight_written_just_before_is_the_one_multiplied(spec):
    weights = [quantize(weight(4096, 2560), spec) for _ in range(2)]
    live = replace(weights[0], tensors={key: tensor.clone() for key, tensor in weights[0].tensors.items()})
    x = torch.randn(4, 2560, device=DEVICE, dtype=FLOAT)
    expected = [decode_rows(x, packed) for packed in weights]
    for turn in range(20):
        for key in live.tensors:
            live.tensors[key].copy_(weights[turn % 2].tensors[key])
        for _ in range(2):
            assert torch.equal(decode_rows(x, live), expected[turn % 2])


@on_gpu
def test_what_is_not_a_number_stays_in_its_row():
    packed = quantize(weight(2048, 7168), FORMATS["int4"])
    x = torch.randn(5, 7168, device=DEVICE, dtype=FLOAT)
    expected = decode_rows(x, packed)
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[3, 100] = value
        y = decode_rows(broken, packed)
        others = [0, 1, 2, 4]
        assert not bool(torch.isfinite(y[3]).all()) and torch.equal(y[others], expected[others])


@on_gpu
def test_a_chain_in_a_graph_reads_what_the_launch_before_wrote():
    packed = [quantize(weight(2048, 2048), FORMATS["int4"]) for _ in range(2)]
    x = torch.randn(7, 2048, device=DEVICE, dtype=FLOAT)

    def chain() -> torch.Tensor:
        y = x
        for turn in range(20):
            y = decode_rows(y, packed[turn % 2])
        return y

    for _ in range(2):
        expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


@on_gpu
@by_format
def test_the_fast_mode_is_taken_by_the_doors_and_as_exact(spec, fast_mode):
    packed = quantize(weight(4096, 2560), spec)
    dense = reference_dequantize(packed)
    x = torch.randn(8, 2560, device=DEVICE, dtype=FLOAT)
    exact = x.double() @ dense.double().T
    fast = linear(x, packed)
    assert torch.equal(fast, decode_rows(x, packed)) and torch.equal(linear(x[2:3], packed), fast[2:3])
    assert error(fast, exact) <= 1.02 * error(torch.nn.functional.linear(x, dense), exact)
    R = torch.eye(32, device=DEVICE, dtype=FLOAT).repeat(80, 1, 1)
    assert torch.equal(oft_linear(x, packed, R), fast)
    set_batch_invariant(True)
    assert torch.equal(linear(x, packed), decode(x, packed))
