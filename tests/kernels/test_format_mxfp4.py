"""MXFP4: E2M1 codes under power-of-two scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_kernels import FormatError, FormatSpec, dequantize, quantize, read
from orbit_kernels.formats.nibbles import decode_e2m1, pack_nibbles

BF16 = torch.bfloat16
SPEC = FormatSpec("mxfp4")


def every_code_under_every_scale() -> dict[str, torch.Tensor]:
    codes = pack_nibbles(torch.arange(16, dtype=torch.uint8).repeat(255, 2))
    return {"weight_packed": codes, "weight_scale": torch.arange(255, dtype=torch.uint8).unsqueeze(1)}


def test_every_code_under_every_scale_means_its_number_times_a_power_of_two():
    tensors = every_code_under_every_scale()
    codes = decode_e2m1(tensors["weight_packed"], torch.float64)
    exact = codes * torch.pow(2.0, tensors["weight_scale"].double() - 127)
    assert torch.equal(dequantize(read(tensors)), exact.to(BF16))  # rounds only at 2^-127 * 0.5 and beyond bf16's top
    assert torch.equal(dequantize(read(tensors), torch.float32), exact.to(BF16).float())


def test_dequantised_values_equal_compressed_tensors_bit_for_bit(compressed_tensors):
    packed = read(every_code_under_every_scale())
    theirs = compressed_tensors.decompress(packed)
    assert theirs.dtype == BF16 and torch.equal(dequantize(packed), theirs)


def test_the_scale_byte_that_is_nan_is_refused():
    tensors = every_code_under_every_scale()
    tensors["weight_scale"][7] = 255
    with pytest.raises(FormatError, match=r"exponents 0..254; found 255 \(NaN in E8M0\) at \(7, 0\)"):
        read(tensors)


def test_scales_typed_as_e8m0_mean_the_same():
    tensors = every_code_under_every_scale()
    typed = {**tensors, "weight_scale": tensors["weight_scale"].view(torch.float8_e8m0fnu)}
    assert torch.equal(dequantize(read(typed)), dequantize(read(tensors)))


def test_quantised_scales_and_codes_equal_compressed_tensors(compressed_tensors, weight):
    packed = quantize(weight, SPEC).validate()
    scale, _ = compressed_tensors.scales(weight, SPEC)
    compress = pytest.importorskip("compressed_tensors.compressors.mx_utils").compress_mx_scale
    assert torch.equal(packed.tensors["weight_scale"], compress(scale, torch.uint8))
    theirs = compressed_tensors.codes(weight, SPEC, scale)
    assert torch.equal(decode_e2m1(packed.tensors["weight_packed"], torch.float32), theirs)


@settings(max_examples=60)
@given(exponent=st.floats(-44.0, 38.2), seed=st.integers(0, 2**20))
def test_quantising_agrees_with_compressed_tensors_at_every_magnitude(compressed_tensors, exponent, seed):
    weight = (torch.rand(4, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * 10.0**exponent
    packed = quantize(weight, SPEC).validate()
    scale, _ = compressed_tensors.scales(weight, SPEC)
    assert torch.equal(packed.tensors["weight_scale"].double(), torch.log2(scale.double()) + 127)
    theirs = compressed_tensors.codes(weight, SPEC, scale)
    assert torch.equal(decode_e2m1(packed.tensors["weight_packed"], torch.float32), theirs)


@pytest.mark.parametrize("amax, exponent", [(6.0, 0), (6.99, 0), (7.0, 1), (4.0, 0), (3.5, 0), (3.49, -1), (1.0, -2)])
def test_the_exponent_rounds_up_from_mantissa_seven_quarters_on(amax, exponent):
    weight = torch.zeros(1, 32)
    weight[0, 0] = amax
    assert int(quantize(weight, SPEC).tensors["weight_scale"]) == 127 + exponent


def test_the_largest_floats_saturate_and_stay_finite():
    largest = torch.full((1, 32), torch.finfo(torch.float32).max)
    packed = quantize(largest, SPEC).validate()
    assert packed.tensors["weight_scale"].tolist() == [[252]]  # compressed-tensors overflows to 255, NaN
    assert dequantize(packed, torch.float32).tolist() == [[6.0 * 2.0**125] * 32]


def test_groups_of_zeros_and_subnormals_take_the_smallest_scale(weight):
    weight = weight.clone()
    weight[9, :32] = 1e-41
    packed = quantize(weight, SPEC).validate()
    assert packed.tensors["weight_scale"][9].tolist() == [0] * 8
    assert dequantize(packed)[9].abs().max() == 0


def test_a_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(FormatError, match="mxfp4 with in_features 48"):
        quantize(torch.zeros(4, 48), SPEC)
