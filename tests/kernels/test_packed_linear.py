"""The linear over a packed weight: same numbers as the dense one, gradient for x alone, no dense weight kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from orbit_kernels import FORMATS, FormatError, FormatSpec, dequantize, linear, quantize
from orbit_kernels import linear as packed_linear
from torch.nn import functional as F

SPECS = [*FORMATS.values(), FormatSpec("int4", 128)]
by_format = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.group_size}")
by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 256, generator=generator).to(dtype).requires_grad_()
    return x, torch.randn(64, generator=generator).to(dtype), torch.randn(3, 5, 64, generator=generator).to(dtype)


@by_format
@by_dtype
def test_forward_and_backward_equal_the_dense_linear_bit_for_bit(spec, dtype, weight):
    packed = quantize(weight, spec)
    x, bias, dy = inputs(dtype)
    dense = dequantize(packed).to(dtype)
    for b in (None, bias):
        ours, theirs = linear(x, packed, b), F.linear(x, dense, b)
        assert ours.dtype == dtype and torch.equal(ours, theirs)
        (dx,), (reference,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy)
        assert torch.equal(dx, reference)


@by_format
@by_dtype
def test_a_resident_dense_weight_changes_no_bit(spec, dtype, weight):
    packed = quantize(weight, spec)
    x, bias, dy = inputs(dtype)
    plain = linear(x, packed, bias)
    for resident in (dequantize(packed), dequantize(packed).to(dtype)):
        cached = linear(x, packed, bias, weight=resident)
        assert torch.equal(cached, plain)
        assert torch.equal(
            torch.autograd.grad(cached, x, dy)[0], torch.autograd.grad(plain, x, dy, retain_graph=True)[0]
        )


@by_format
def test_float32_compute_uses_the_bfloat16_values_of_the_weight(spec, weight):
    packed = quantize(weight, spec)
    identity = torch.eye(256)
    assert torch.equal(linear(identity, packed).T, dequantize(packed, torch.bfloat16).float())


@pytest.mark.parametrize("name, width", [("int4", 32), ("fp8", 8), ("nvfp4", 16), ("mxfp4", 32), ("bf16", 8)])
def test_gradients_are_right_by_finite_differences(name, width):
    packed = quantize(torch.randn(3, width), FORMATS[name])
    x = torch.randn(2, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: linear(x, packed), (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: linear(x * x, packed), (x,), fast_mode=True)


def test_no_dense_weight_and_no_activation_outlive_the_forward_pass(weight, monkeypatch):
    packed = quantize(weight, FORMATS["int4"])
    module = __import__("sys").modules[packed_linear.__module__]
    made: list[weakref.ref] = []

    def recording(*args):
        dense = dequantize(*args)
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(module, "dequantize", recording)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(torch.randn(7, 256, requires_grad=True), packed)
    gc.collect()
    assert not saved and [ref() for ref in made] == [None]
    y.sum().backward()
    assert len(made) == 2  # once forward, once backward


def test_works_under_checkpointing_autocast_and_without_gradients(weight):
    from torch.utils.checkpoint import checkpoint

    packed = quantize(weight, FORMATS["int4"])
    x, _, dy = inputs(torch.float32)
    (plain,) = torch.autograd.grad(linear(x, packed), x, dy)
    (again,) = torch.autograd.grad(checkpoint(lambda x: linear(x, packed), x, use_reentrant=False), x, dy)
    assert torch.equal(plain, again)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, packed)
    (mixed,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    assert mixed.dtype == torch.float32 and torch.allclose(mixed, plain, rtol=0.05, atol=0.05)
    with torch.inference_mode():
        assert not linear(x, packed).requires_grad
    assert not linear(x.detach(), packed).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@by_format
@by_dtype
def test_on_a_gpu_it_equals_the_dense_linear(spec, dtype, weight):
    """Bit for bit, but for the decode kernel, whose sums have an order of their own (fast_suite.py judges them)."""
    packed = quantize(weight, spec).to("cuda")
    x, bias, dy = (tensor.detach().cuda() for tensor in inputs(dtype))
    x.requires_grad_()
    ours, theirs = linear(x, packed, bias), F.linear(x, dequantize(packed).to(dtype), bias)
    if spec.name == "int4" and dtype == torch.bfloat16:
        assert torch.allclose(ours, theirs, rtol=2**-7, atol=2**-7)
    else:
        assert torch.equal(ours, theirs)
    assert torch.equal(torch.autograd.grad(ours, x, dy)[0], torch.autograd.grad(theirs, x, dy)[0])


def test_any_leading_shape_and_stride_is_taken(weight):
    packed, dense = quantize(weight, FORMATS["int4"]), dequantize(quantize(weight, FORMATS["int4"])).float()
    for x in (torch.randn(256), torch.randn(2, 3, 4, 256), torch.randn(256, 6).T, torch.randn(0, 256)):
        assert torch.equal(linear(x, packed), F.linear(x, dense))


def test_what_does_not_fit_or_is_not_frozen_is_refused(weight):
    packed = quantize(weight, FORMATS["int4"])
    x = torch.randn(2, 256)
    for call, message in [
        (
            lambda: linear(torch.randn(2, 255), packed),
            r"linear input: expected float \[\.\.\., 256\]; found .* \(2, 255\)",
        ),
        (lambda: linear(x.int(), packed), "linear input: expected float"),
        (lambda: linear(x, packed, torch.zeros(63)), r"linear bias: expected \(64,\); found \(63,\)"),
        (lambda: linear(x, packed, weight=torch.zeros(256, 64)), r"linear dense weight: expected \(64, 256\)"),
        (lambda: linear(x, packed, torch.zeros(64, requires_grad=True)), "linear bias: expected a frozen tensor"),
        (lambda: linear(x, packed, weight=torch.zeros(64, 256, requires_grad=True)), "dense weight: expected a frozen"),
    ]:
        with pytest.raises(FormatError, match=message):
            call()
    with torch.no_grad():
        linear(x, packed, torch.zeros(64, requires_grad=True))
