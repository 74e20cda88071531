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


def by_expert(device: str, dtype: torch.dtype, counts: list[int]) -> list[list[torch.Tensor]]:
    """Result and gradients for x, A and B: by `counts`, and by one call for each expert."""
    x, A, B = (
        torch.randn(shape, device=device).to(dtype).requires_grad_()
        for shape in ((sum(counts), 64), (len(counts), 8, 64), (len(counts), 32, 8))
    )
    parts = [lora_delta(part, A[e], B[e], 2.0) for e, part in enumerate(x.split(counts))]
    results = lora_delta(x, A, B, 2.0, torch.tensor(counts, device=device)), torch.cat(parts)
    dy = torch.randn_like(results[0])
    return [[y, *torch.autograd.grad(y, (x, A, B), dy)] for y in results]


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [7]])
def test_rows_of_experts_go_through_their_own_pair(counts):
    for found, expected in zip(*by_expert("cpu", torch.float32, counts), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 200, 0, 0, 64, 1000, 0], [700]])
def test_grouped_products_on_a_gpu_are_those_of_each_expert_also_where_it_has_no_rows(counts):
    junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(4)]
    del junk  # what is not written would be NaN
    for found, expected in zip(*by_expert("cuda", torch.bfloat16, counts), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), atol=0.1, rtol=0.02)


def test_counts_ask_for_a_pair_of_each_expert():
    with pytest.raises(ValueError, match=r"A\[E, r, in\]"):
        lora_delta(torch.zeros(2, 16), torch.zeros(4, 16), torch.zeros(8, 4), 1.0, torch.tensor([2]))
    with pytest.raises(ValueError, match="counts"):
        lora_delta(torch.zeros(2, 16), torch.zeros(1, 4, 16), torch.zeros(1, 8, 4), 1.0, torch.tensor([3]))
