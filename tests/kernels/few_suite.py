"""What both decode products of few tokens promise, `decode_wave` with weights of four bits and `decode_rows` with FP8
too; run by test_fast_paths.py as fast_suite.py is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fast_suite import DEVICE, FLOAT, error, modelopt, on_gpu, replays_alike, weight
from orbit_kernels import FORMATS, FormatSpec, PackedWeight, linear, oft_linear, quantize, set_batch_invariant
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast import decode_rows, decode_wave
from orbit_kernels.fast.decode import decode

SPECS = [FORMATS["int4"], FormatSpec("int4", 128), FORMATS["mxfp4"], FORMATS["nvfp4"]]
PRODUCTS = {"wave": decode_wave.decode_wave, "rows": decode_rows.decode_rows}
TAKEN = [("wave", spec) for spec in SPECS] + [("rows", spec) for spec in (*SPECS, FORMATS["fp8"])]
by_product = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
by_name_and_format = pytest.mark.parametrize(
    "name, spec", TAKEN, ids=[f"{name}-{spec.name}-{spec.group_size}" for name, spec in TAKEN]
)
SHAPES = {
    "wave": [(128, 256), (384, 512), (1280, 2816), (4224, 768), (36992, 1024), (2048, 7168)],
    "rows": [(16, 512), (208, 1024), (2128, 1536), (7168, 2048), (2048, 7168), (16896, 512)],
}
TOKENS = {"wave": (1, 7, 8, 9, 16, 17, 33, 64), "rows": range(1, 17)}


def spellings(packed: PackedWeight) -> list[PackedWeight]:
    """The weight as it is, and as others store it."""
    if packed.spec.name == "nvfp4":
        return [packed, modelopt(packed)]
    if packed.spec.name == "fp8":
        scale = packed.tensors["weight_scale_inv"].to(torch.bfloat16)
        return [packed, replace(packed, tensors={"weight": packed.tensors["weight"], "weight_scale": scale})]
    return [packed]


@on_gpu
@pytest.mark.parametrize("name, spec, shape", [(name, spec, shape) for name, spec in TAKEN for shape in SHAPES[name]])
def test_any_shape_is_shared_out_and_a_row_has_the_same_bits_for_every_number_of_tokens(name, spec, shape):
    product, packed = PRODUCTS[name], quantize(weight(*shape), spec)
    assert {"wave": decode_wave, "rows": decode_rows}[name].supports(packed)
    x = torch.randn(max(TOKENS[name]), shape[1], device=DEVICE, dtype=FLOAT)
    bias = torch.randn(shape[0], device=DEVICE, dtype=FLOAT)
    dense = reference_dequantize(packed)
    exact = x.double() @ dense.double().T + bias.double()
    whole = product(x, packed, bias)
    assert error(whole, exact) <= 1.02 * error(torch.nn.functional.linear(x, dense, bias), exact)
    for tokens in TOKENS[name]:
        for _ in range(2):  # read late, read early
            assert torch.equal(product(x[:tokens].contiguous(), packed, bias), whole[:tokens])


@on_gpu
@by_name_and_format
def test_unit_vectors_give_the_bits_of_the_dequantised_weight(name, spec):
    packed = quantize(torch.randn(256, 1536, device=DEVICE) * torch.logspace(-6, 3, 1536, device=DEVICE), spec)
    codes = next(tensor for tensor in packed.tensors.values() if tensor.shape[0] == 256).view(torch.uint8)
    codes.random_(0, 256)
    if spec.name == "fp8":
        codes[codes & 0x7F == 0x7F] = 0  # NaN, which no weight may hold
    for one in spellings(packed):
        columns = torch.eye(1536, device=DEVICE, dtype=FLOAT).split(16)
        assert torch.equal(torch.cat([PRODUCTS[name](part, one) for part in columns]).T, reference_dequantize(one))


@on_gpu
@by_name_and_format
def test_tensors_may_begin_anywhere(name, spec):
    packed, product = quantize(weight(256, 512), spec), PRODUCTS[name]
    x = torch.randn(3, 512, device=DEVICE, dtype=FLOAT)
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(3, 512)
    key = "weight" if spec.name == "fp8" else "weight_packed"
    words = packed.tensors[key]
    octets, size = words.view(torch.uint8), words.element_size()  # torch joins no FP8
    shifted = torch.cat([octets.new_zeros(size), octets.flatten()])[size:].view(octets.shape).view(words.dtype)
    moved = replace(packed, tensors=packed.tensors | {key: shifted})
    for _ in range(3):
        assert torch.equal(product(odd, moved), product(x, packed))


@on_gpu
@by_name_and_format
def test_a_weight_written_just_before_is_the_one_multiplied(name, spec):
    product = PRODUCTS[name]
    weights = [quantize(weight(4096, 2560), spec) for _ in range(2)]
    live = replace(weights[0], tensors={key: tensor.clone() for key, tensor in weights[0].tensors.items()})
    x = torch.randn(4, 2560, device=DEVICE, dtype=FLOAT)
    expected = [product(x, packed) for packed in weights]
    for turn in range(20):
        for key in live.tensors:
            live.tensors[key].copy_(weights[turn % 2].tensors[key])
        for _ in range(2):
            assert torch.equal(product(x, live), expected[turn % 2])


@on_gpu
@by_product
def test_what_is_not_a_number_stays_in_its_row_and_leaves_nothing_behind(product):
    packed = quantize(weight(2048, 7168), FORMATS["int4"])
    x = torch.randn(5, 7168, device=DEVICE, dtype=FLOAT)
    expected, others = product(x, packed), [0, 1, 2, 4]
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[3, 100] = value
        y = product(broken, packed)
        assert not bool(torch.isfinite(y[3]).all()) and torch.equal(y[others], expected[others])
        assert torch.equal(product(x, packed), expected)


@on_gpu
@by_product
def test_a_chain_in_a_graph_reads_what_the_launch_before_wrote(product):
    packed = [quantize(weight(2048, 2048), FORMATS["int4"]) for _ in range(2)]
    x = torch.randn(7, 2048, device=DEVICE, dtype=FLOAT)

    def chain() -> torch.Tensor:
        y = x
        for turn in range(20):
            y = product(y, packed[turn % 2])
        return y

    chain()  # from now on weights are at rest
    replays_alike(chain, chain())


@on_gpu
@by_name_and_format
def test_the_fast_mode_is_taken_by_the_doors_and_as_exact(name, spec, fast_mode):
    shape = {"wave": (1024, 512), "rows": (4096, 2560)}[name]
    packed = quantize(weight(*shape), spec)
    dense = reference_dequantize(packed)
    x = torch.randn(8, shape[1], device=DEVICE, dtype=FLOAT)
    exact = x.double() @ dense.double().T
    fast = linear(x, packed)
    assert torch.equal(fast, PRODUCTS[name](x, packed)) and torch.equal(linear(x[2:3], packed), fast[2:3])
    assert error(fast, exact) <= 1.02 * error(torch.nn.functional.linear(x, dense), exact)
    R = torch.eye(32, device=DEVICE, dtype=FLOAT).repeat(shape[1] // 32, 1, 1)
    assert torch.equal(oft_linear(x, packed, R), fast)
    set_batch_invariant(True)
    assert torch.equal(linear(x, packed), decode(x, packed))
