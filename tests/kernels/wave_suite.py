"""What the decode product in one wave promises; run by test_fast_paths.py as fast_suite.py is."""

from __future__ import annotations

import torch
from fast_suite import DEVICE, FLOAT, on_gpu, weight
from orbit_kernels import FORMATS, quantize, set_batch_invariant
from orbit_kernels.fast.decode import in_one_wave
from orbit_kernels.fast.decode_wave import MOST, constants, cut, decode_wave
from orbit_kernels.fast.launching import at_rest

SHAPES = [(9728, 2560), (2560, 9728), (4096, 2560), (7168, 2048), (2048, 7168), (128, 256), (36992, 1024), (256, 65536)]


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
