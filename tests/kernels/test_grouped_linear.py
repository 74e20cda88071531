"""`grouped_linear` on a CPU: one linear per expert, for any counts; what it refuses; stacks hold bytes once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_kernels import FORMATS, FormatError, FormatSpec, PackedStack, grouped_linear, linear, quantize


def stack_of(count: int, spec: FormatSpec = FORMATS["int4"]) -> PackedStack:
    return PackedStack.of([quantize(torch.randn(16, 32) * 0.05, spec) for _ in range(count)])


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6))
@settings(max_examples=20)
def test_each_expert_sees_its_rows_and_its_gradient(counts):
    experts = stack_of(len(counts))
    x = torch.randn(sum(counts), 32, requires_grad=True)
    dy = torch.randn(sum(counts), 16)
    y = grouped_linear(x, torch.tensor(counts), experts)
    pieces = [linear(part, experts[e]) for e, part in enumerate(x.split(counts))]
    assert torch.equal(y, torch.cat(pieces))
    (dx,), (expected,) = (torch.autograd.grad(result, x, dy) for result in (y, torch.cat(pieces)))
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_stack_hands_out_the_weights_it_was_made_of_without_copying(name):
    width = 128 if name == "fp8" else 32
    weights = [quantize(torch.randn(16, width), FORMATS[name]) for _ in range(3)]
    stack = PackedStack.of(weights)
    assert len(stack) == 3 and stack.nbytes == sum(weight.nbytes for weight in weights)
    for index, weight in enumerate(weights):
        for key, tensor in stack[index].tensors.items():
            same = (tensor.view(torch.uint8), weight.tensors[key].view(torch.uint8))
            assert torch.equal(*same) and tensor.untyped_storage().data_ptr() == stack.tensors[key].data_ptr()
    with pytest.raises(IndexError, match="stack of 3 weights"):
        stack[3]


def test_a_stack_is_filled_weight_by_weight_in_any_order():
    weights = [quantize(torch.randn(16, 32), FORMATS["int4"]) for _ in range(3)]
    stack = PackedStack.empty(weights[0], 3, torch.device("cpu"))
    for index in (2, 0, 1):
        put = stack.put(index, weights[index])
        assert all(torch.equal(put.tensors[key], tensor) for key, tensor in weights[index].tensors.items())
    assert all(torch.equal(t, PackedStack.of(weights).tensors[key]) for key, t in stack.tensors.items())
    other = quantize(torch.randn(16, 64), FORMATS["int4"])
    assert not stack.takes(other)
    with pytest.raises(FormatError, match="weight 1 of a stack"):
        stack.put(1, other)


def test_weights_of_different_kinds_do_not_stack():
    with pytest.raises(FormatError, match="weight 1 of a stack"):
        PackedStack.of([quantize(torch.randn(16, 32), FORMATS[name]) for name in ("int4", "mxfp4")])


@pytest.mark.parametrize(
    ("counts", "complaint"),
    [
        (torch.tensor([1, 2]), "expected int32 or int64"),
        (torch.tensor([1.0, 2.0, 3.0]), "expected int32 or int64"),
        (torch.tensor([1, 2, 3]), "add up to 5"),
        (torch.tensor([7, -2, 0]), "add up to 5"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts, complaint):
    with pytest.raises(FormatError, match=complaint):
        grouped_linear(torch.randn(5, 32), counts, stack_of(3))


def test_an_input_of_another_width_is_refused():
    with pytest.raises(FormatError, match="expected float"):
        grouped_linear(torch.randn(5, 16), torch.tensor([5]), stack_of(1))
