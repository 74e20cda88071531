"""A linear with its adapter on a CPU: the reference's composition, slots, experts and slices; what is refused."""

from __future__ import annotations

import pytest
import torch
from orbit_kernels import (
    FORMATS,
    FormatError,
    cayley_neumann,
    linear,
    lora_delta,
    lora_linear,
    oft_linear,
    quantize,
    rotate,
    rotate_slices,
)

PACKED = quantize(torch.randn(24, 64) * 0.05, FORMATS["int4"])


def rotations(*layers: int, b: int = 16) -> torch.Tensor:
    v = torch.randn(int(torch.tensor(layers).prod()) * 64 // b, b * (b - 1) // 2) * 0.05
    return cayley_neumann(v, b).view(*layers, 64 // b, b, b)


def low_rank(*slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*slots, 4, 64), torch.randn(*slots, 24, 4)


def test_it_is_the_linear_of_the_rotated_input_or_with_the_low_rank_product_added():
    x, R, (A, B) = torch.randn(2, 5, 64), rotations(1)[0], low_rank()
    assert torch.equal(oft_linear(x, PACKED, R), linear(rotate(x, R), PACKED))
    assert torch.equal(lora_linear(x, PACKED, A, B, 0.5), linear(x, PACKED) + lora_delta(x, A, B, 0.5))


def test_a_slot_names_the_adapter_that_applies():
    x, R, (A, B) = torch.randn(5, 64), rotations(3), low_rank(3)
    for index in (2, 0):
        slot = torch.tensor([index], dtype=torch.int32)
        assert torch.equal(oft_linear(x, PACKED, R, slot=slot), oft_linear(x, PACKED, R[index]))
        with_slot = lora_linear(x, PACKED, A, B, 0.5, slot=slot)
        assert torch.equal(with_slot, lora_linear(x, PACKED, A[index], B[index], 0.5))


def test_rows_sorted_by_expert_get_their_experts_rotation_and_give_it_its_gradient():
    counts, R = torch.tensor([2, 0, 3]), rotations(3).requires_grad_()
    x = torch.randn(5, 64, requires_grad=True)
    y = rotate(x, R, counts=counts)
    assert torch.equal(y, torch.cat([rotate(x[:2], R[0]), rotate(x[2:], R[2])]))
    dR, dx = torch.autograd.grad(y.sum(), (R, x))
    assert dR[0].any() and not dR[1].any() and dx.shape == x.shape


def test_slices_are_rotations_of_one_input_and_their_gradients_add_up():
    x, R = torch.randn(5, 64, requires_grad=True), rotations(3).requires_grad_()
    once, each = rotate_slices(x, R), [rotate(x, one) for one in R]
    assert all(map(torch.equal, once, each))
    for a, b in zip(torch.autograd.grad(once, (x, R), each), torch.autograd.grad(each, (x, R), each), strict=True):
        torch.testing.assert_close(a, b)


def test_a_rotation_may_be_made_in_another_dtype_than_its_parameters():
    v = (torch.randn(4, 120) * 0.05).requires_grad_()
    R = cayley_neumann(v, 16, torch.bfloat16)
    assert R.dtype == torch.bfloat16 and torch.equal(R, cayley_neumann(v, 16).bfloat16())
    assert torch.autograd.grad(R.sum(), v)[0].dtype == v.dtype


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: oft_linear(x, PACKED, rotations(2)), ValueError, r"expected \[n, b, b\]; found \(2, 4, 16, 16\)"),
        (lambda x: oft_linear(x[:, :48], PACKED, rotations(1)[0]), ValueError, "cover 64; input width is 48"),
        (lambda x: rotate(x, rotations(2), torch.zeros(2)), ValueError, "a slot of one element"),
        (lambda x: rotate(x, rotations(2).requires_grad_(), torch.zeros(1)), ValueError, "without gradient"),
        (lambda x: rotate(x, rotations(2), counts=torch.tensor([1, 2])), FormatError, "add up to 5"),
        (lambda x: rotate(x[None], rotations(2), counts=torch.tensor([1, 4])), ValueError, r"expected x\[tokens, 64\]"),
        (lambda x: rotate_slices(x, rotations(1)[0]), ValueError, "n, b, b"),
        (lambda x: lora_linear(x, PACKED, *low_rank(2), 1.0), ValueError, r"expected A\[r, in\], B\[out, r\]"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(5, 64))
