"""INT4, compressed-tensors pack-quantized: what its bytes mean and how weights become such bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_kernels import FormatError, FormatSpec, PackedWeight, dequantize, quantize, read
from orbit_kernels.formats.int4 import Int4

SPEC = FormatSpec("int4", 32)
BF16 = torch.bfloat16


def stored(codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, packed here by hand: nibble i of a word holds column i, offset by 8."""
    out, width = codes.shape
    padded = torch.nn.functional.pad(codes + 8, (0, -width % 8)).to(torch.int64)
    words = sum(padded[:, i::8] << (4 * i) for i in range(8))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([out, width])}


def random_codes(out: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 8, (out, width), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def test_each_of_the_sixteen_codes_means_its_number_times_the_scale():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(1, 2)
    packed = read(stored(codes, torch.tensor([[0.25]], dtype=BF16)))
    assert dequantize(packed, torch.float32).tolist() == (codes * 0.25).tolist()


def test_the_low_nibble_of_a_word_is_the_first_column():
    word = torch.tensor([[0x76543210]], dtype=torch.int32).repeat(1, 4)
    tensors = {
        "weight_packed": word,
        "weight_scale": torch.ones(1, 1, dtype=BF16),
        "weight_shape": torch.tensor([1, 32]),
    }
    assert dequantize(read(tensors))[0, :8].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1]


def test_unpacked_codes_equal_those_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(16, 64)
    words = helpers.pack_to_int32(codes, 4)
    tensors = stored(codes, torch.ones(16, 2, dtype=BF16))
    assert torch.equal(tensors["weight_packed"], words)
    assert torch.equal(Int4().codes(read(tensors)), helpers.unpack_from_int32(words, 4, codes.shape))


@pytest.mark.parametrize("width, group", [(64, 32), (256, 128), (192, 64), (40, 20), (36, 36)])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantised_values_equal_compressed_tensors_bit_for_bit(compressed_tensors, width, group, scale_dtype):
    scale = (torch.rand(24, width // group) + 0.01).to(scale_dtype)
    packed = read(stored(random_codes(24, width), scale))
    assert packed.spec.group_size == group
    theirs = compressed_tensors.decompress(packed)
    assert theirs.dtype == scale_dtype
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(dequantize(packed, dtype), theirs.to(dtype))


@pytest.mark.parametrize("scale", [2.0**-133, 2.0**-126, 2.0**127, 3.3e38], ids=["subnormal", "normal", "2^127", "max"])
def test_extreme_scales_dequantise_as_in_compressed_tensors(compressed_tensors, scale):
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(1, 2)
    packed = read(stored(codes, torch.tensor([[scale]], dtype=BF16)))
    assert torch.equal(dequantize(packed), compressed_tensors.decompress(packed))


def test_float32_compute_sees_the_bfloat16_values(weight):
    packed = quantize(weight, SPEC)
    assert torch.equal(dequantize(packed, torch.float32), dequantize(packed, BF16).float())


@pytest.mark.parametrize("group", [32, 128])
def test_quantised_scales_and_codes_equal_compressed_tensors(compressed_tensors, weight, group):
    spec = FormatSpec("int4", group)
    packed = quantize(weight, spec)
    scale, _ = compressed_tensors.scales(weight, spec)
    assert torch.equal(packed.tensors["weight_scale"], scale.to(BF16))
    theirs = compressed_tensors.codes(weight, spec, packed.tensors["weight_scale"])
    assert torch.equal(Int4().codes(packed).float(), theirs)


def test_a_bfloat16_weight_quantises_like_its_float32_copy(compressed_tensors, weight):
    narrow = weight.to(BF16)
    packed, wide = quantize(narrow, SPEC), quantize(narrow.float(), SPEC)
    assert all(torch.equal(packed.tensors[key], wide.tensors[key]) for key in packed.tensors)
    theirs, _ = compressed_tensors.scales(narrow, SPEC)  # computed by them in bfloat16
    nonzero = narrow.unflatten(1, (-1, 32)).abs().amax(dim=2) > 0
    assert torch.equal(packed.tensors["weight_scale"][nonzero], theirs[nonzero])


@settings(max_examples=40)
@given(exponent=st.floats(-44.0, 38.0), seed=st.integers(0, 2**20))
def test_quantising_agrees_with_compressed_tensors_at_every_magnitude(compressed_tensors, exponent, seed):
    weight = (torch.rand(4, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * 10.0**exponent
    packed = quantize(weight, SPEC).validate()
    scale, _ = compressed_tensors.scales(weight, SPEC)
    stored_scale = scale.to(BF16)
    representable = stored_scale != 0  # theirs can round to a scale of zero, ours never does
    assert torch.equal(packed.tensors["weight_scale"][representable], stored_scale[representable])
    theirs = compressed_tensors.codes(weight, SPEC, packed.tensors["weight_scale"])
    assert torch.equal(Int4().codes(packed).float(), theirs)


def test_minus_eight_is_emitted_and_survives():
    weight = torch.linspace(-7.5, 7.0, 32).unsqueeze(0)
    packed = read(quantize(weight, SPEC).tensors)
    assert Int4().codes(packed).min() == -8
    assert dequantize(packed).min() == -8.0


def test_the_error_is_at_most_half_a_step_except_where_the_top_is_clamped(weight):
    packed = quantize(weight, SPEC)
    step = packed.tensors["weight_scale"].float().repeat_interleave(32, dim=1)
    error = (Int4().codes(packed) * step - weight).abs() / step
    assert error.max() <= 0.56  # 7.5 / 7 clamped costs 0.5, the rounded scale up to 2^-8 of 8 more
    assert error[Int4().codes(packed) < 7].max() <= 0.5001


def test_groups_of_zeros_stay_zero(weight):
    dense = dequantize(quantize(weight, SPEC).validate())
    assert dense[9].abs().max() == 0 and dense[8, 32:64].abs().max() == 0


@pytest.mark.parametrize("group", [16, 64, 256])
def test_only_group_sizes_that_serving_kernels_read_are_written(weight, group):
    with pytest.raises(FormatError, match=rf"group_size to write: expected \(32, 128\); found {group}"):
        quantize(weight, FormatSpec("int4", group))


def test_a_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(FormatError, match=r"in_features 48.*divisible by group size 32.*remainder 16"):
        quantize(torch.zeros(4, 48), SPEC)


def declared(**weights) -> dict:
    return {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}}}}


def test_a_declared_group_size_that_the_scales_contradict_is_an_error(weight):
    tensors = quantize(weight, SPEC).tensors
    assert read(tensors, declared(strategy="group", group_size=32)).spec == SPEC
    with pytest.raises(FormatError, match=r"declares for weight \(64, 256\): expected \[128\]; found 32"):
        read(tensors, declared(strategy="group", group_size=128))


def test_one_scale_per_row_is_a_group_as_wide_as_the_row():
    tensors = stored(random_codes(4, 64), torch.ones(4, 1, dtype=BF16))
    assert read(tensors, declared(strategy="channel", group_size=None)).spec.group_size == 64
    assert read(tensors, declared(strategy="channel", group_size=-1)).spec.group_size == 64


def test_asymmetric_and_reordered_checkpoints_are_refused(weight):
    tensors = quantize(weight, SPEC).tensors
    with pytest.raises(FormatError, match="symmetric=false"):
        read(tensors, declared(symmetric=False, group_size=32))
    with pytest.raises(FormatError, match="weight_zero_point: asymmetric"):
        read({**tensors, "weight_zero_point": torch.zeros(8, 8, dtype=torch.int32)})
    with pytest.raises(FormatError, match="weight_g_idx: activation-ordered"):
        read({**tensors, "weight_g_idx": torch.arange(256)})


def test_eight_bit_words_under_the_same_names_are_refused(weight):
    tensors = {**quantize(weight, SPEC).tensors, "weight_packed": torch.zeros(64, 64, dtype=torch.int32)}
    with pytest.raises(FormatError, match=r"int4 weight_packed shape .*expected \(64, 32\); found \(64, 64\)"):
        read(tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_named(weight, bad):
    tensors = quantize(weight, SPEC).tensors
    tensors["weight_scale"][2, 3] = bad
    with pytest.raises(FormatError, match=rf"int4 weight_scale: expected finite scales; found {bad} at \(2, 3\)"):
        read(tensors)


def test_a_zero_scale_is_legal_only_over_zero_codes():
    codes = torch.zeros(2, 64, dtype=torch.int8)
    scale = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=BF16)
    assert dequantize(read(stored(codes, scale))).abs().max() == 0
    codes[0, 40] = 3
    with pytest.raises(FormatError, match=r"found scale 0 at \(0, 1\) over a nonzero code at \(0, 40\)"):
        read(stored(codes, scale))


def test_a_weight_shape_that_is_not_the_shape_is_refused(weight):
    tensors = {**quantize(weight, SPEC).tensors, "weight_shape": torch.tensor([64, 128])}
    with pytest.raises(FormatError, match="int4"):
        read(tensors)
    with pytest.raises(FormatError, match=r"weight_shape: expected \(64, 256\); found \(64, 128\)"):
        PackedWeight(SPEC, (64, 256), tensors).validate()
    with pytest.raises(FormatError, match=r"weight_shape: expected two sizes \(out, in\); found \[64\]"):
        read({**tensors, "weight_shape": torch.tensor([64])})
