"""FP8 with a scale per block: every code, ragged edges, finer grids, both spellings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_kernels import FormatError, FormatSpec, PackedWeight, dequantize, quantize, read

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
SPEC = FormatSpec("fp8")


def random_fp8(out: int, width: int, seed: int = 0) -> torch.Tensor:
    codes = torch.randint(0, 256, (out, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return codes.masked_fill_((codes & 0x7F) == 0x7F, 0).view(E4M3)


def e4m3(code: int) -> float:
    """The standard, restated: 1 sign, 4 exponent (bias 7), 3 mantissa bits; S.1111.111 is NaN, no infinities."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_every_code_means_its_e4m3_number_times_the_scale():
    codes = torch.arange(256, dtype=torch.uint8).unsqueeze(0)
    scale = torch.tensor([[0.375, 2.0]])
    packed = PackedWeight(SPEC, (1, 256), {"weight": codes.view(E4M3), "weight_scale_inv": scale})
    expected = torch.tensor([e4m3(code) * (0.375 if code < 128 else 2.0) for code in range(256)])
    assert torch.equal(dequantize(packed, torch.float32)[0].nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_nan_is_no_weight(code):
    weight = torch.zeros(2, 128, dtype=torch.uint8)
    weight[1, 5] = code
    with pytest.raises(FormatError, match=r"fp8 weight: expected numbers; found NaN at \(1, 5\)"):
        read({"weight": weight.view(E4M3), "weight_scale_inv": torch.ones(1, 1)})


@pytest.mark.parametrize("key, dtype", [("weight_scale_inv", torch.float32), ("weight_scale", torch.float32),
                                        ("weight_scale", BF16)])  # fmt: skip
@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (5, 7), (128, 129)])
def test_dequantised_values_equal_compressed_tensors_bit_for_bit(compressed_tensors, key, dtype, shape):
    grid = (-(-shape[0] // 128), -(-shape[1] // 128))
    packed = read({"weight": random_fp8(*shape), key: (torch.rand(grid) * 1e-3 + 1e-5).to(dtype)})
    padded = torch.nn.functional.pad(packed.tensors["weight"].float(), (0, -shape[1] % 128, 0, -shape[0] % 128))
    whole = PackedWeight(SPEC, tuple(padded.shape), {"weight": padded.to(E4M3), key: packed.tensors[key]})
    theirs = compressed_tensors.decompress(whole)[: shape[0], : shape[1]]
    assert theirs.dtype == dtype
    assert torch.equal(dequantize(packed, BF16), theirs.to(BF16))
    assert torch.equal(dequantize(packed, torch.float32), theirs.float())


@pytest.mark.parametrize("scale", [1e-45, 2.0**-126, 3.4e38], ids=["subnormal", "smallest normal", "max"])
def test_extreme_scales_dequantise_as_in_compressed_tensors(compressed_tensors, scale):
    packed = read({"weight": random_fp8(128, 128), "weight_scale_inv": torch.full((1, 1), scale)})
    assert torch.equal(dequantize(packed, torch.float32), compressed_tensors.decompress(packed))


def test_quantised_scales_and_codes_equal_compressed_tensors(compressed_tensors):
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1)) * 0.02
    packed = quantize(weight, SPEC)
    scale, _ = compressed_tensors.scales(weight, SPEC)
    assert torch.equal(packed.tensors["weight_scale_inv"], scale)
    assert torch.equal(packed.tensors["weight"].float(), compressed_tensors.codes(weight, SPEC, scale))


@settings(max_examples=30)
@given(out=st.integers(1, 300), width=st.integers(1, 300), exponent=st.integers(-40, 36))
def test_any_shape_and_magnitude_survives_within_the_precision_of_e4m3(out, width, exponent):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(out * width)) * 10.0**exponent
    packed = quantize(weight, SPEC).validate()
    assert packed.tensors["weight_scale_inv"].shape == (-(-out // 128), -(-width // 128))
    step = packed.tensors["weight_scale_inv"].repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :width]
    error = (dequantize(packed, torch.float32) - weight).abs()
    tiny = torch.finfo(torch.float32).smallest_normal
    assert bool((error <= weight.abs() * 2**-4 * 1.001 + step * 2.0**-10 * 1.001 + tiny).all())


def test_each_block_uses_the_whole_range():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    weight[:128, :128] *= 100
    codes = quantize(weight, SPEC).tensors["weight"].float().abs().view(2, 128, 2, 128).amax(dim=(1, 3))
    assert torch.equal(codes, torch.full((2, 2), 448.0))


def test_a_block_of_zeros_has_scale_one():
    weight = torch.zeros(256, 128)
    weight[:128] = 7.0
    assert quantize(weight, SPEC).validate().tensors["weight_scale_inv"].tolist() == [[7 / 448], [1.0]]


def test_a_finer_row_grid_is_stated_and_not_guessed():
    weight, scale = random_fp8(128, 256), torch.rand(4, 2) + 0.1
    fine = PackedWeight(SPEC, (128, 256), {"weight": weight, "weight_scale_inv": scale}, block=(32, 128)).validate()
    expected = weight.float() * scale.repeat_interleave(32, 0).repeat_interleave(128, 1)
    assert torch.equal(dequantize(fine, torch.float32), expected)
    with pytest.raises(FormatError, match=r"weight_scale_inv shape for weight \(128, 256\).*\(1, 2\).*\(4, 2\)"):
        read({"weight": weight, "weight_scale_inv": scale})


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8", "weight_block_size": [32, 128]},
        {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "block_structure": [32, 128]}}}},
    ],
    ids=["fine-grained", "compressed-tensors"],
)
def test_the_block_that_a_checkpoint_declares_is_the_one_used(config):
    tensors = {"weight": random_fp8(128, 256), "weight_scale_inv": torch.rand(4, 2) + 0.1}
    assert read(tensors, config).block == (32, 128)


def test_blocks_that_cannot_be_told_apart_are_refused():
    tensors = {"weight": random_fp8(20, 20), "weight_scale_inv": torch.ones(1, 1)}
    group = {"num_bits": 8, "type": "float"}
    config = {
        "config_groups": {
            "a": {"weights": {**group, "block_structure": [64, 64]}},
            "b": {"weights": {**group, "block_structure": [128, 128]}},
        }
    }
    with pytest.raises(FormatError, match=r"blocks \[\(64, 64\), \(128, 128\)\] all fit"):
        read(tensors, config)


def test_per_channel_and_per_tensor_scales_are_refused_with_a_reason():
    for scale in (torch.ones(256, 1), torch.ones(1)):
        with pytest.raises(FormatError, match="Per-tensor and per-channel FP8 are not supported"):
            read({"weight": random_fp8(256, 256), "weight_scale": scale})


def test_damaged_scales_are_named():
    weight = random_fp8(256, 128)
    with pytest.raises(FormatError, match=r"fp8 weight_scale_inv: expected finite scales; found nan at \(1, 0\)"):
        read({"weight": weight, "weight_scale_inv": torch.tensor([[1.0], [float("nan")]])})
    with pytest.raises(FormatError, match=r"found scale 0 at \(1, 0\) over a nonzero code"):
        read({"weight": weight, "weight_scale_inv": torch.tensor([[1.0], [0.0]])})
