"""What the decode product in one wave promises; run by test_fast_paths.py as fast_suite.py is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fast_suite import DEVICE, FLOAT, error, modelopt, on_gpu, weight
from orbit_kernels import FORMATS, FormatSpec, linear, oft_linear, quantize, set_batch_invariant
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast.decode import decode, in_one_wave
from orbit_kernels.fast.decode_wave import MOST, constants, cut, decode_wave, supports
from orbit_kernels.fast.launching import at_rest

SPECS = [FORMATS["int4"], FormatSpec("int4", 128), FORMATS["mxfp4"], FORMATS["nvfp4"]]
by_format = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.group_size}")
SHAPES = [(9728, 2560), (2560, 9728), (4096, 2560), (7168, 2048), (2048, 7168), (128, 256), (36992, 1024), (256, 65536)]


@pytest.fixture
def fast_mode():
    set_batch_invariant(False)
    yield
    set_batch_invariant(True)


def test_shares_are_even_and_small_and_hold_all_of_a_weight():
    for out, width in SHAPES:
        programs, slots = cut(out, width)
        units = out // 128 * (width // 128)
        least = units // programs
        assert least >= 1 and -(-units // programs) <= MOST
        assert slots >= -(-(width // 128) // least)  # programs that may have a part of a tile
        for tiles in (1, 2, 4, 8):
            chosen = constants(out, width, tiles)
            assert chosen["TOGETHER"] * tiles <= 16 and chosen["AT_ONCE"] >= 1


def test_a_product_goes_there_only_where_rows_may_change_their_bits(fast_mode):
    packed = {spec.name: quantize(weight(256, 512), spec) for spec in (FORMATS["mxfp4"], FORMATS["nvfp4"])}
    long = quantize(weight(128, 4352), FORMATS["mxfp4"])
    assert in_one_wave(packed["mxfp4"], 16) and not in_one_wave(packed["mxfp4"], 17)
    assert in_one_wave(long, 8) and not in_one_wave(long, 9)
    assert in_one_wave(packed["nvfp4"], 64) and not in_one_wave(quantize(weight(64, 256), FORMATS["nvfp4"]), 1)
    set_batch_invariant(True)
    assert not in_one_wave(packed["mxfp4"], 1) and in_one_wave(packed["nvfp4"], 1)


def test_a_tensor_is_at_rest_from_its_second_reading_until_it_is_written():
    tensor, other = torch.zeros(4), torch.zeros(4)
    assert not at_rest(tensor) and at_rest(tensor)
    assert not at_rest(tensor, other) and at_rest(tensor, other)
    other[1] = 1.0
    assert not at_rest(tensor, other) and at_rest(other, tensor)
    tensor.data = torch.ones(4)
    assert not at_rest(tensor) and at_rest(tensor)
    with torch.inference_mode():
        assert not any(at_rest(unwatched) for unwatched in [torch.zeros(4)] * 2)


@on_gpu
@by_format
@pytest.mark.parametrize("shape", [(128, 256), (384, 512), (1280, 2816), (4224, 768), (36992, 1024), (2048, 7168)])
def test_any_shape_is_shared_evenly_and_nothing_missed(spec, shape):
    packed = quantize(weight(*shape), spec)
    assert supports(packed)
    x, bias = torch.randn(64, shape[1], device=DEVICE, dtype=FLOAT), torch.randn(shape[0], device=DEVICE, dtype=FLOAT)
    dense = reference_dequantize(packed)
    exact = x.double() @ dense.double().T + bias.double()
    whole = decode_wave(x, packed, bias)
    assert error(whole, exact) <= 1.02 * error(torch.nn.functional.linear(x, dense, bias), exact)
    for tokens in (1, 7, 8, 9, 16, 17, 33):
        for _ in range(2):  # read late, read early
            assert torch.equal(decode_wave(x[:tokens].contiguous(), packed, bias), whole[:tokens])


@on_gpu
@by_format
def test_unit_vectors_give_the_bits_of_the_dequantised_weight(spec):
    packed = quantize(torch.randn(256, 512, device=DEVICE) * torch.logspace(-6, 3, 512, device=DEVICE), spec)
    next(tensor for tensor in packed.tensors.values() if tensor.shape[0] == 256).view(torch.uint8).random_(0, 256)
    for one in (packed, modelopt(packed)) if spec.name == "nvfp4" else (packed,):
        columns = torch.eye(512, device=DEVICE, dtype=FLOAT).split(16)
        assert torch.equal(torch.cat([decode_wave(part, one) for part in columns]).T, reference_dequantize(one))


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
        assert torch.equal(decode_wave(odd, moved), decode_wave(x, packed))


@on_gpu
@by_format
def test_a_weight_written_just_before_is_the_one_multiplied(spec):
    weights = [quantize(weight(4096, 2560), spec) for _ in range(2)]
    live = replace(weights[0], tensors={key: tensor.clone() for key, tensor in weights[0].tensors.items()})
    x = torch.randn(4, 2560, device=DEVICE, dtype=FLOAT)
    expected = [decode_wave(x, packed) for packed in weights]
    for turn in range(20):
        for key in live.tensors:
            live.tensors[key].copy_(weights[turn % 2].tensors[key])
        for _ in range(2):
            assert torch.equal(decode_wave(x, live), expected[turn % 2])


@on_gpu
def test_what_is_not_a_number_is_passed_on_and_leaves_nothing_behind():
    packed = quantize(weight(2048, 7168), FORMATS["int4"])
    x = torch.randn(5, 7168, device=DEVICE, dtype=FLOAT)
    expected = decode_wave(x, packed)
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[3, 100] = value
        y = decode_wave(broken, packed)
        assert not bool(torch.isfinite(y[3]).all()) and torch.equal(y[:3], expected[:3])
        assert torch.equal(decode_wave(x, packed), expected)


@on_gpu
def test_graphs_of_one_stream_keep_their_sums_apart_and_may_be_replayed_side_by_side():
    packed = quantize(weight(2048, 7168), FORMATS["int4"])
    xs = [torch.randn(4, 7168, device=DEVICE, dtype=FLOAT) for _ in range(2)]
    expected = [decode_wave(x, packed) for x in xs]
    graphs, ys = [], []
    for x in xs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys.append([decode_wave(x, packed) for _ in range(20)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for y in (each for several in ys for each in several):
            y.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, right) for several, right in zip(ys, expected, strict=True) for y in several)


@on_gpu
@by_format
def test_the_fast_mode_is_taken_by_the_doors_and_as_exact(spec, fast_mode):
    packed = quantize(weight(1024, 512), spec)
    dense = reference_dequantize(packed)
    x = torch.randn(8, 512, device=DEVICE, dtype=FLOAT)
    exact = x.double() @ dense.double().T
    fast = linear(x, packed)
    assert torch.equal(fast, decode_wave(x, packed)) and torch.equal(linear(x[2:3], packed), fast[2:3])
    assert error(fast, exact) <= 1.02 * error(torch.nn.functional.linear(x, dense), exact)
    R = torch.eye(32, device=DEVICE, dtype=FLOAT).repeat(16, 1, 1)
    assert torch.equal(oft_linear(x, packed, R), fast)
    set_batch_invariant(True)
    assert torch.equal(linear(x, packed), decode(x, packed))
