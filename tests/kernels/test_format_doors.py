"""The doors that all formats share: specs, detection, reading untouched bytes, structure errors, determinism."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_kernels import FORMATS, FormatError, FormatSpec, PackedWeight, dequantize, detect, quantize, read

BF16 = torch.bfloat16
SPECS = [*FORMATS.values(), FormatSpec("int4", 128)]
by_format = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.group_size}")


@pytest.mark.parametrize(
    "name, group", [("int4", 32), ("fp8", 128), ("nvfp4", 16), ("mxfp4", 32), ("bf16", 0)]
)  # fmt: skip
def test_a_spec_without_group_size_has_its_formats_own(name, group):
    assert FormatSpec(name).group_size == group and FORMATS[name] == FormatSpec(name, group)


@pytest.mark.parametrize("group", [1, 16, 64, 128, 7168])
def test_int4_groups_of_any_published_size_can_be_described(group):
    assert FormatSpec("int4", group).block == (1, group)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int8",), "expected one of int4, fp8, nvfp4, mxfp4, bf16; found 'int8'"),
        (("int4", 0), "int4 group_size: expected a positive int; found 0"),
        (("int4", -1), "int4 group_size: expected a positive int; found -1"),
        (("int4", 32.0), "int4 group_size: expected an int; found 32.0"),
        (("nvfp4", 32), "nvfp4 group_size: the format fixes 16; found 32"),
        (("bf16", 32), "bf16 group_size: the format fixes 0; found 32"),
    ],
)
def test_a_spec_that_no_format_has_is_refused(arguments, message):
    with pytest.raises(FormatError, match=message):
        FormatSpec(*arguments)


@pytest.mark.parametrize(
    "names, found",
    [
        ("weight_packed weight_scale weight_shape", "int4"),
        ("weight_packed weight_scale weight_shape bias", "int4"),
        ("weight weight_scale_inv", "fp8"),
        ("weight weight_scale", "fp8"),
        ("weight_packed weight_scale weight_global_scale", "nvfp4"),
        ("weight_packed weight_scale weight_global_scale input_global_scale", "nvfp4"),
        ("weight weight_scale weight_scale_2", "nvfp4"),
        ("weight weight_scale weight_scale_2 input_scale bias", "nvfp4"),
        ("weight_packed weight_scale", "mxfp4"),
        ("weight", "bf16"),
        ("weight bias", "bf16"),
        ("bias", None),
        ("weight input_scale weight_scale", None),
        ("qweight qzeros scales", None),
        ("", None),
    ],
)
def test_a_layout_is_known_by_exactly_its_suffixes(names, found):
    assert detect(set(names.split())) == found


def test_unknown_tensors_are_listed():
    with pytest.raises(FormatError, match=r"suffixes of a known format; found \['qweight', 'scales'\]"):
        read({"scales": torch.ones(1), "qweight": torch.ones(1)})


@by_format
def test_reading_touches_no_byte(spec, weight):
    stored = dict(quantize(weight, spec).tensors)
    packed = read({**stored, "bias": torch.zeros(64)})
    assert packed.spec == spec and packed.shape == (64, 256) and set(packed.tensors) == set(stored)
    assert all(packed.tensors[key] is stored[key] for key in stored)


@by_format
def test_quantising_is_deterministic_and_reads_any_float_dtype_as_float32(spec, weight):
    once, again, double = quantize(weight, spec), quantize(weight.clone(), spec), quantize(weight.double(), spec)
    for key, tensor in once.tensors.items():
        assert torch.equal(tensor, again.tensors[key]) and torch.equal(tensor, double.tensors[key])


@by_format
def test_a_quantised_weight_is_close_to_what_it_was_made_from(spec, weight):
    error = (dequantize(quantize(weight, spec), torch.float32) - weight).norm() / weight.norm()
    assert error < {"int4": 0.2, "fp8": 0.04, "nvfp4": 0.12, "mxfp4": 0.15, "bf16": 0.003}[spec.name]


@settings(max_examples=25)
@given(spec=st.sampled_from(SPECS), out=st.integers(1, 40), groups=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_what_is_dequantised_stands_on_the_grid_and_keeps_shape_dtype_and_layout(spec, out, groups, seed):
    weight = torch.randn(out, groups * max(spec.group_size, 1), generator=torch.Generator().manual_seed(seed))
    packed = quantize(weight, spec).validate()
    for dtype in (BF16, torch.float16, torch.float32, torch.float64):
        dense = dequantize(packed, dtype)
        assert dense.shape == weight.shape and dense.dtype == dtype and dense.is_contiguous()
        assert not dense.requires_grad
    if spec.name in ("mxfp4", "bf16"):  # power-of-two scales: rounding twice is rounding once
        again = quantize(dequantize(packed, torch.float32), spec)
        assert torch.equal(dequantize(again), dequantize(packed))


@by_format
def test_a_weight_that_is_not_a_finite_float_matrix_is_refused(spec, weight):
    for bad, message in [
        (weight[0], r"two dimensions \(out, in\); found \(256,\)"),
        (weight.int(), "a float dtype; found torch.int32"),
        (weight.masked_fill(weight > 3, float("nan")), "finite numbers"),
        (weight.double() * 1e300, "finite numbers in float32"),
    ]:
        with pytest.raises(FormatError, match=message):
            quantize(bad, spec)


@by_format
@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_only_floats_of_sixteen_bits_or_more_are_dequantised_to(spec, weight, dtype):
    with pytest.raises(FormatError, match="dequantize dtype: expected a float of 16 bits or more"):
        dequantize(quantize(weight, spec), dtype)


@by_format
def test_structure_errors_name_the_tensor_what_was_expected_and_what_was_found(spec, weight):
    packed = quantize(weight, spec)
    for key, tensor in packed.tensors.items():
        others = {name: other for name, other in packed.tensors.items() if name != key}
        with pytest.raises(FormatError, match=rf"{spec.name} tensor {key}: expected shape .*; found nothing"):
            PackedWeight(spec, packed.shape, others)
        with pytest.raises(FormatError, match=rf"{spec.name} {key} dtype: expected .*; found complex64"):
            PackedWeight(spec, packed.shape, {**others, key: torch.zeros(tensor.shape, dtype=torch.complex64)})
        with pytest.raises(FormatError, match=rf"{spec.name} {key} shape for weight \(64, 256\): .*found \(2, 3, 5\)"):
            PackedWeight(spec, packed.shape, {**others, key: torch.zeros(2, 3, 5).to(tensor.dtype)})
    with pytest.raises(FormatError, match="also weight_surprise"):
        PackedWeight(spec, packed.shape, {**packed.tensors, "weight_surprise": torch.ones(1)})
    with pytest.raises(FormatError, match=r"shape: expected \(out, in\), both positive; found \(64, 0\)"):
        PackedWeight(spec, (64, 0), packed.tensors)
    if spec.name != "fp8":
        with pytest.raises(FormatError, match=rf"{spec.name} block"):
            PackedWeight(spec, packed.shape, packed.tensors, block=(3, 5))


def test_a_float32_checkpoint_is_not_mistaken_for_bf16(weight):
    with pytest.raises(FormatError, match="bf16 weight dtype: expected bfloat16; found float32"):
        read({"weight": weight})


def test_a_bf16_weight_with_nan_is_refused(weight):
    with pytest.raises(FormatError, match="bf16 weight: expected finite numbers; found 1 that are not"):
        read({"weight": weight.to(BF16).masked_fill(weight > 3.9, float("nan"))})


def test_a_bf16_weight_is_dequantised_without_a_copy(weight):
    packed = quantize(weight, FORMATS["bf16"])
    assert dequantize(packed) is packed.tensors["weight"]


@by_format
def test_size_device_and_copies_keep_the_weight(spec, weight):
    packed = quantize(weight, spec)
    assert packed.nbytes == sum(tensor.nbytes for tensor in packed.tensors.values())
    for twin in (packed.to("cpu"), copy.deepcopy(packed)):
        assert (twin.spec, twin.shape, twin.block) == (packed.spec, packed.shape, packed.block)
        assert torch.equal(dequantize(twin), dequantize(packed))
    assert packed.to("meta").device.type == "meta"


def test_bits_per_weight_are_what_the_formats_promise():
    weight = torch.randn(128, 512)
    bits = {name: quantize(weight, spec).nbytes * 8 / weight.numel() for name, spec in FORMATS.items()}
    assert {name: round(value, 2) for name, value in bits.items()} == {
        "int4": 4.5, "fp8": 8.0, "nvfp4": 4.5, "mxfp4": 4.25, "bf16": 16.0,
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@by_format
def test_every_device_quantises_and_dequantises_to_the_same_bits(spec, weight):
    here, there = quantize(weight, spec), quantize(weight.cuda(), spec).validate()
    for key, tensor in here.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), there.tensors[key].cpu().view(torch.uint8)), key
    for dtype in (BF16, torch.float16, torch.float32):
        assert torch.equal(dequantize(here, dtype), dequantize(here.to("cuda"), dtype).cpu())
