"""LoRA: the two thin products, in PEFT's order."""

from __future__ import annotations

import pytest
import torch
from orbit_kernels import lora_delta


def test_it_is_x_through_a_then_b_times_the_scaling():
    x, A, B = torch.randn(2, 3, 16).double(), torch.randn(4, 16).double(), torch.randn(8, 4).double()
    torch.testing.assert_close(lora_delta(x, A, B, 0.5), (x @ A.T) @ B.T * 0.5)


def test_it_equals_peft_bit_for_bit():
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(16, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    layer, x = model.base_model.model[0], torch.randn(5, 16)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(layer.base_layer(x) + lora_delta(x, A, B, 6 / 4), model(x))


def test_gradients_are_right_by_finite_differences():
    shapes = [(3, 6), (2, 6), (5, 2)]
    x, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(lambda x, A, B: lora_delta(x, A, B, 2.0), (x, A, B))


def test_mixed_dtypes_compute_in_the_wider_and_return_the_dtype_of_x():
    x, A, B = torch.randn(5, 16).bfloat16(), torch.randn(4, 16), torch.randn(8, 4)
    assert torch.equal(lora_delta(x, A, B, 2.0), lora_delta(x.float(), A, B, 2.0).bfloat16())
    assert lora_delta(x.float(), A.bfloat16(), B.bfloat16(), 2.0).dtype == torch.float32


def test_shapes_that_do_not_chain_are_named():
    for shapes in [((2, 15), (4, 16), (8, 4)), ((2, 16), (4, 16), (8, 3)), ((2, 16), (16,), (8, 4))]:
        x, A, B = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(ValueError, match=r"expected x\[\.\.\., in\], A\[r, in\], B\[out, r\]; found x \(2, 1"):
            lora_delta(x, A, B, 1.0)
