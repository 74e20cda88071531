"""FP8 by FP8: what is quantised, what is computed, which gradient x gets, and what is refused."""

from __future__ import annotations

import pytest
import torch
from orbit_kernels import FORMATS, FormatError, FormatSpec, linear, linear_w8a8, quantize, quantize_activations


def test_activations_are_codes_times_a_scale_for_each_row_and_128_columns():
    x = torch.randn(2, 5, 300) * torch.tensor([1e-4, 1.0]).view(2, 1, 1)
    x[0, 0, :128] = 0.0
    codes, scales = quantize_activations(x)
    assert codes.shape == x.shape and codes.dtype == torch.float8_e4m3fn and scales.shape == (2, 5, 3)
    assert scales[0, 0, 0] == 1.0
    spread = scales.repeat_interleave(128, dim=-1)[..., :300]
    assert bool(((codes.float() * spread - x).abs() <= x.abs() / 16 + spread * 2**-10).all())
    for group, columns in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        largest = codes[..., columns].float().abs().amax(-1)
        assert bool((largest[scales[..., group] != 1.0] == 448).all())


@pytest.mark.parametrize("out, width", [(256, 384), (200, 300), (64, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_codes_in_float64(out, width, dtype):
    packed = quantize(torch.randn(out, width) * 0.05, FORMATS["fp8"])
    x, bias = torch.randn(3, 7, width).to(dtype), torch.randn(out).to(dtype)
    codes, scales = quantize_activations(x)
    left = codes.double() * scales.double().repeat_interleave(128, dim=-1)[..., :width]
    by_block = packed.tensors["weight_scale_inv"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact = left @ (packed.tensors["weight"].double() * by_block[:out, :width]).t() + bias.double()
    y = linear_w8a8(x, packed, bias)
    assert y.dtype == dtype and y.shape == (3, 7, out)
    assert float((y.double() - exact).norm() / exact.norm()) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_the_gradient_of_x_is_that_of_linear_straight_through_the_quantisation():
    packed = quantize(torch.randn(128, 256) * 0.05, FORMATS["fp8"])
    x, dy = torch.randn(4, 256, requires_grad=True), torch.randn(4, 128)
    (dx,) = torch.autograd.grad(linear_w8a8(x, packed), x, dy)
    assert torch.equal(dx, torch.autograd.grad(linear(x, packed), x, dy)[0])


def test_other_formats_widths_and_biases_are_refused():
    packed = quantize(torch.randn(128, 256), FORMATS["fp8"])
    with pytest.raises(FormatError, match="expected fp8 in blocks"):
        linear_w8a8(torch.randn(1, 256), quantize(torch.randn(128, 256), FormatSpec("int4")))
    with pytest.raises(FormatError, match="W8A8 input"):
        linear_w8a8(torch.randn(1, 128), packed)
    with pytest.raises(FormatError, match=r"W8A8 bias: expected \(128,\)"):
        linear_w8a8(torch.randn(1, 256), packed, torch.randn(1))
    with pytest.raises(FormatError, match="frozen"):
        linear_w8a8(torch.randn(1, 256), packed, torch.randn(128, requires_grad=True))
    with pytest.raises(FormatError, match="activations"):
        quantize_activations(torch.ones(2, 128, dtype=torch.int64))
