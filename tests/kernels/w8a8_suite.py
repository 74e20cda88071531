"""What FP8 by FP8 promises on its fast path; run by test_fast_paths.py as fast_suite.py is."""

from __future__ import annotations

import pytest
import torch
from fast_suite import DEVICE, FLOAT, GPU, error, on_gpu
from orbit_kernels import FORMATS, PackedWeight, linear, linear_w8a8, quantize
from orbit_kernels.fast.quantize_activations import quantize_activations
from orbit_kernels.fast.w8a8 import plan, product_w8a8
from orbit_kernels.w8a8 import GROUP
from orbit_kernels.w8a8 import _quantize as reference


def activations(rows: int, width: int) -> torch.Tensor:
    x = torch.randn(rows, width, device=DEVICE) * torch.logspace(-6, 6, rows, device=DEVICE)[:, None]
    x[0, :GROUP] = 0.0
    x[-1, :3] = torch.tensor([1e-30, -1e-38, 3e4])
    return x


def require_the_reference(x: torch.Tensor) -> None:
    (codes, scales), (same_codes, same_scales) = quantize_activations(x), reference(x)
    assert torch.equal(scales, same_scales)
    found, expected = codes.float(), same_codes.float()
    if GPU:
        assert torch.equal(found, expected)
    else:  # the interpreter errs: ties go up, 124.8 loses its carry and becomes 64, not 128, 1e-40 is not 0
        found = torch.where(found * 2 == expected.sign() * 2 ** expected.abs().log2().round(), expected, found)
        assert bool(((found - expected).abs() <= expected.abs() / 8 + 2**-6).all())


@pytest.mark.parametrize("rows, width", [(1, 128), (37, 384)])
@pytest.mark.parametrize("dtype", [FLOAT, torch.float32])
def test_activations_have_the_codes_and_scales_of_the_reference(rows, width, dtype):
    require_the_reference(activations(rows, width).to(dtype))


@pytest.mark.parametrize("amax", [1e-42, 1e-38, 3e38])
def test_so_do_those_whose_scale_has_no_inverse(amax):
    x = torch.rand(3, 128, device=DEVICE) * 2 - 1
    x[:, 5] = 1.0
    require_the_reference(x * amax)


def test_what_is_not_a_number_stays_so():
    x = torch.randn(2, 256, device=DEVICE)
    x[0, 3] = float("nan")
    codes, scales = quantize_activations(x)
    assert scales.isnan().tolist() == [[True, False], [False, False]]
    if GPU:  # the interpreter has no NaN in FP8
        assert codes.float().isnan().any(1).tolist() == [True, False]


@on_gpu
@pytest.mark.parametrize("rows", [1, 63, 128, 1000])
@pytest.mark.parametrize("out, width, biased", [(256, 128, True), (384, 1280, False), (2560, 640, True)])
def test_the_product_is_as_near_to_float64_as_bfloat16_is_and_no_bit_depends_on_tiles_or_company(
    rows, out, width, biased
):
    packed = quantize(torch.randn(out, width, device="cuda") * 0.05, FORMATS["fp8"])
    bias = torch.randn(out, device="cuda").bfloat16() if biased else None
    codes, scales = quantize_activations(activations(rows, width).bfloat16())
    exact = in_float64(codes, scales, packed) + (0 if bias is None else bias.double())
    y = product_w8a8(codes, scales, packed, bias)
    per_row = (y.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(per_row.max()) < 5e-3
    tiles = -(-rows // 128) * (out // 128)
    for pairs in {0, tiles // 4, tiles // 2} if out % 256 == 0 else {0}:
        assert torch.equal(y, product_w8a8(codes, scales, packed, bias, pairs))
    assert torch.equal(y[-1:], product_w8a8(codes[-1:].clone(), scales[-1:], packed, bias))


@pytest.mark.parametrize(
    "tiles, even, pairs",
    [(64, True, 0), (160, True, 80), (320, True, 132), (639, False, 0), (2432, True, 1188)],
)
def test_what_whole_rounds_of_pairs_leave_goes_tile_by_tile_where_one_round_holds_it(tiles, even, pairs):
    assert plan(tiles, even, 132) == pairs


def in_float64(codes: torch.Tensor, scales: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    by_block = packed.tensors["weight_scale_inv"].double()
    weight = packed.tensors["weight"].double() * by_block.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    return (codes.double() * scales.double().repeat_interleave(GROUP, 1)) @ weight.t()


@on_gpu
def test_the_door_takes_it_and_its_gradient_is_that_of_linear():
    packed = quantize(torch.randn(512, 256, device="cuda") * 0.05, FORMATS["fp8"])
    x = torch.randn(2, 100, 256, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(2, 100, 512, device="cuda").bfloat16()
    y = linear_w8a8(x, packed)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(linear(x, packed), x, dy)[0])
    assert 1e-3 < error(y.detach(), linear(x, packed).detach()) < 5e-2
