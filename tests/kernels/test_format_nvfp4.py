"""NVFP4: codes, scales per 16, one scale per tensor; in compressed-tensors' spelling and in ModelOpt's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_kernels import FormatError, FormatSpec, dequantize, quantize, read
from orbit_kernels.formats.nibbles import decode_e2m1, encode_e2m1, pack_nibbles

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
SPEC = FormatSpec("nvfp4")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
EVERY_CODE = pack_nibbles(torch.arange(16, dtype=torch.uint8).unsqueeze(0))


def every_code_under_every_scale(whole: float) -> dict[str, torch.Tensor]:
    """One row per E4M3 scale that is not NaN, each holding all sixteen codes; the zero scale holds zeros."""
    scales = torch.arange(127, dtype=torch.uint8).view(E4M3).unsqueeze(1)
    codes = EVERY_CODE.repeat(127, 1)
    codes[0] = 0
    return {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": torch.tensor([whole])}


def modelopt(tensors: dict[str, torch.Tensor], second: float) -> dict[str, torch.Tensor]:
    return {
        "weight": tensors["weight_packed"],
        "weight_scale": tensors["weight_scale"],
        "weight_scale_2": torch.tensor(second),
    }


def test_each_of_the_sixteen_codes_means_its_e2m1_number():
    tensors = {
        "weight_packed": EVERY_CODE,
        "weight_scale": torch.ones(1, 1).to(E4M3),
        "weight_global_scale": torch.ones(1),
    }
    assert dequantize(read(tensors)).tolist() == [E2M1]


def test_the_low_nibble_of_a_byte_is_the_even_column():
    assert decode_e2m1(torch.tensor([[0x21, 0xF7]], dtype=torch.uint8), BF16).tolist() == [[0.5, 1.0, 6.0, -6.0]]


def test_unpacked_codes_equal_those_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    octets = torch.arange(256, dtype=torch.uint8).unsqueeze(0)
    theirs = helpers.unpack_fp4_from_uint8(octets, 1, 512, dtype=torch.float32)
    ours = decode_e2m1(octets, torch.float32)
    assert torch.equal(ours, theirs) and torch.equal(ours.signbit(), theirs.signbit())


@pytest.mark.parametrize("whole", [1.0, 7 / 3, 2688.0, 3e-5, 1e30, 2.0**-100])
def test_dequantised_values_equal_compressed_tensors_bit_for_bit(compressed_tensors, whole):
    packed = read(every_code_under_every_scale(whole))
    theirs = compressed_tensors.decompress(packed)
    assert theirs.dtype == BF16 and torch.equal(dequantize(packed), theirs)


def test_in_float32_the_product_is_not_rounded_to_bfloat16(compressed_tensors):
    packed = read(every_code_under_every_scale(7 / 3))
    exact = compressed_tensors.quantization.lifecycle.forward.dequantize(
        decode_e2m1(packed.tensors["weight_packed"], BF16),
        scale=packed.tensors["weight_scale"].to(BF16),
        args=compressed_tensors.args(SPEC),
        global_scale=packed.tensors["weight_global_scale"],
        dtype=torch.float32,
    )
    wide = dequantize(packed, torch.float32)
    assert torch.equal(wide, exact) and not torch.equal(wide, wide.to(BF16).float())


def test_modelopt_multiplies_the_scales_in_float32_and_casts_once():
    tensors = modelopt(every_code_under_every_scale(1.0), second=0.00123)
    packed = read(tensors)
    per_group = packed.tensors["weight_scale"].float() * torch.tensor(0.00123)
    expected = decode_e2m1(tensors["weight"], torch.float32) * per_group
    assert torch.equal(dequantize(packed), expected.to(BF16))
    assert torch.equal(dequantize(packed, torch.float32), expected)


def test_the_two_spellings_agree_where_the_reciprocal_is_exact():
    tensors = every_code_under_every_scale(256.0)
    assert torch.equal(dequantize(read(tensors)), dequantize(read(modelopt(tensors, 1 / 256))))


@pytest.mark.parametrize("key", ["input_global_scale", "input_scale"])
def test_an_activation_scale_is_carried_along(key):
    tensors = every_code_under_every_scale(2.0)
    tensors = {**(tensors if key == "input_global_scale" else modelopt(tensors, 0.5)), key: torch.tensor([3.0])}
    packed = read(tensors)
    assert packed.tensors[key] is tensors[key]
    with pytest.raises(FormatError, match="suffixes of a known format"):
        read({**every_code_under_every_scale(2.0), "input_scale": torch.tensor([3.0])})  # the other spelling's name


def test_quantised_scales_and_codes_equal_compressed_tensors(compressed_tensors, weight):
    packed = quantize(weight, SPEC).validate()
    scale, whole = compressed_tensors.scales(weight, SPEC)
    assert torch.equal(packed.tensors["weight_global_scale"], whole)
    assert torch.equal(packed.tensors["weight_scale"].float(), scale.float())
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    theirs = helpers.quantize_and_pack_fp4(weight, packed.tensors["weight_scale"].float(), global_scale=whole)
    assert torch.equal(packed.tensors["weight_packed"], theirs)


@settings(max_examples=40)
@given(exponent=st.floats(-38.0, 37.0), spread=st.floats(0.0, 6.0), seed=st.integers(0, 2**20))
def test_quantising_agrees_with_compressed_tensors_at_every_magnitude(compressed_tensors, exponent, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(4, 64, generator=generator) * 2 - 1) * 10.0**exponent
    weight *= 10.0 ** (-spread * torch.rand(4, 4, generator=generator)).repeat_interleave(16, dim=1)
    packed = quantize(weight, SPEC).validate()
    scale, whole = compressed_tensors.scales(weight, SPEC)
    assert torch.equal(packed.tensors["weight_global_scale"], whole)
    assert torch.equal(packed.tensors["weight_scale"].float(), scale.float())
    theirs = compressed_tensors.codes(weight, SPEC, scale, whole)
    assert torch.equal(decode_e2m1(packed.tensors["weight_packed"], torch.float32), theirs)


TIES = [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]


@pytest.mark.parametrize("value, nearest", [*TIES, (0.2501, 0.5), (5.01, 6.0), (1e30, 6.0)])
def test_ties_go_to_the_even_code_and_the_top_saturates(value, nearest):
    codes = encode_e2m1(torch.tensor([[value, -value]]))
    assert decode_e2m1(pack_nibbles(codes), torch.float32).tolist() == [[nearest, -nearest]]


def test_every_number_of_the_format_is_its_own_nearest():
    assert encode_e2m1(torch.tensor(E2M1)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]


def test_groups_and_tensors_of_zeros_stay_zero(weight):
    packed = quantize(weight, SPEC).validate()
    assert dequantize(packed)[9].abs().max() == 0
    assert packed.tensors["weight_scale"][9].float().tolist() == [0.125] * 16
    nothing = quantize(torch.zeros(2, 32), SPEC).validate()
    assert nothing.tensors["weight_global_scale"].tolist() == [1.0] and dequantize(nothing).abs().max() == 0


@pytest.mark.parametrize("whole", [0.0, -1.0, float("inf"), float("nan")])
def test_a_tensor_scale_that_cannot_be_is_refused(whole):
    with pytest.raises(FormatError, match="nvfp4 weight_global_scale"):
        read(every_code_under_every_scale(whole))
    with pytest.raises(FormatError, match="nvfp4 weight_scale_2"):
        read(modelopt(every_code_under_every_scale(1.0), whole))


def test_damaged_group_scales_are_named():
    tensors = every_code_under_every_scale(1.0)
    tensors["weight_packed"][0] = EVERY_CODE
    with pytest.raises(FormatError, match=r"nvfp4 weight_scale: .*found scale 0 at \(0, 0\) over a nonzero code"):
        read(tensors)
    tensors["weight_scale"].view(torch.uint8)[5, 0] = 0x7F
    with pytest.raises(FormatError, match=r"expected finite scales; found nan at \(5, 0\)"):
        read(tensors)


def test_a_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(FormatError, match=r"nvfp4 with in_features 40: expected .*group size 16; found remainder 8"):
        quantize(torch.zeros(4, 40), SPEC)
