"""OFT: the rotation that PEFT's files mean, its gradients, and how far from orthogonal it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_kernels.oft import (
    block_count,
    cayley_neumann,
    error_law,
    orthogonality_error,
    rotate,
    skew,
    skew_norm,
)

SIZES = [2, 3, 4, 8, 16, 32]


def vectors(n: int, b: int, std: float = 0.1, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, b * (b - 1) // 2, generator=generator, dtype=torch.float64) * std).to(dtype)


def test_the_vector_is_the_strict_upper_triangle_row_by_row():
    Q = skew(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 4)
    assert Q.tolist() == [[0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]


@pytest.mark.parametrize("b", SIZES)
def test_q_is_skew_for_any_leading_shape(b):
    v = torch.randn(2, 3, b * (b - 1) // 2)
    Q = skew(v, b)
    assert Q.shape == (2, 3, b, b) and torch.equal(Q, -Q.transpose(-1, -2))
    upper = torch.triu_indices(b, b, 1)
    assert torch.equal(Q[..., upper[0], upper[1]], v)


@pytest.mark.parametrize("b", SIZES)
def test_r_is_the_five_term_series(b):
    v = vectors(3, b)
    Q, one = skew(v, b), torch.eye(b, dtype=torch.float64)
    series = one + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
    torch.testing.assert_close(cayley_neumann(v, b), series, rtol=0, atol=1e-14)


def test_r_approximates_the_cayley_transform_and_not_its_transpose():
    v = vectors(3, 8, std=0.02)
    Q, one = skew(v, 8), torch.eye(8, dtype=torch.float64)
    exact = (one + Q) @ torch.linalg.inv(one - Q)
    R = cayley_neumann(v, 8)
    assert (R - exact).abs().max() < 1e-4 < (R - exact.transpose(-1, -2)).abs().max()


def test_a_zero_vector_is_exactly_the_identity():
    for dtype in (torch.float32, torch.bfloat16):
        v = torch.zeros(2, 496, dtype=dtype)
        assert torch.equal(cayley_neumann(v, 32), torch.eye(32, dtype=dtype).expand(2, 32, 32))
        x = torch.randn(5, 64).to(dtype)
        assert torch.equal(rotate(x, cayley_neumann(v, 32)), x)


@pytest.mark.parametrize("b", [2, 3, 5])
def test_gradients_are_right_by_finite_differences(b):
    v = vectors(2, b, std=0.3).requires_grad_()
    x = torch.randn(2, 2 * b, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: skew(v, b), (v,))
    assert torch.autograd.gradcheck(lambda v: cayley_neumann(v, b), (v,))
    assert torch.autograd.gradcheck(lambda x, v: rotate(x, cayley_neumann(v, b)), (x, v))


@settings(max_examples=25)
@given(b=st.sampled_from(SIZES), n=st.integers(1, 5), std=st.floats(0.0, 0.5), seed=st.integers(0, 2**20))
def test_the_analytic_gradient_equals_autograd_through_the_series(b, n, std, seed):
    v = vectors(n, b, std, seed=seed).requires_grad_()
    g = torch.randn(n, b, b, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    (ours,) = torch.autograd.grad(cayley_neumann(v, b), v, g)
    Q, one = skew(v, b), torch.eye(b, dtype=torch.float64)
    series = one + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
    (theirs,) = torch.autograd.grad(series, v, g)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_bfloat16_parameters_are_computed_in_float32_and_rounded_once():
    v = vectors(4, 32, 0.02, torch.bfloat16)
    assert torch.equal(cayley_neumann(v, 32), cayley_neumann(v.float(), 32).bfloat16())
    narrow, wide = v.clone().requires_grad_(), v.float().requires_grad_()
    g = torch.randn(4, 32, 32).bfloat16()
    cayley_neumann(narrow, 32).backward(g)
    cayley_neumann(wide, 32).backward(g.float())
    assert torch.equal(narrow.grad, wide.grad.bfloat16())


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
def test_rotating_blocks_is_multiplying_by_the_block_diagonal(leading):
    R = cayley_neumann(vectors(4, 8), 8)
    x = torch.randn(*leading, 32, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, R), x @ torch.block_diag(*R), rtol=1e-12, atol=1e-12)


def test_the_dense_equivalent_is_the_weight_times_the_transposed_rotation():
    R, weight = cayley_neumann(vectors(4, 8), 8), torch.randn(6, 32, dtype=torch.float64)
    x = torch.randn(5, 32, dtype=torch.float64)
    merged = weight @ torch.block_diag(*R).T
    torch.testing.assert_close(rotate(x, R) @ weight.T, x @ merged.T, rtol=1e-12, atol=1e-12)


def test_strided_inputs_rotate_alike():
    R, x = cayley_neumann(vectors(4, 8), 8), torch.randn(32, 10, dtype=torch.float64).T
    torch.testing.assert_close(rotate(x, R), rotate(x.contiguous(), R), rtol=1e-12, atol=1e-12)


def test_mixed_dtypes_compute_in_the_wider_and_return_the_dtype_of_x():
    R, x = cayley_neumann(vectors(4, 8, dtype=torch.float32), 8), torch.randn(5, 32).bfloat16()
    assert torch.equal(rotate(x, R), rotate(x.float(), R).bfloat16())
    assert rotate(x.float(), R.bfloat16()).dtype == torch.float32


@settings(max_examples=60)
@given(b=st.sampled_from(SIZES), n=st.integers(1, 4), s=st.floats(1e-3, 1.0), seed=st.integers(0, 2**20))
def test_the_orthogonality_error_is_2s4_minus_s8(b, n, s, seed):
    v = vectors(n, b, 1.0, seed=seed)
    v = v * (s / skew_norm(v, b))
    assert float(skew_norm(v, b)) == pytest.approx(s, rel=1e-9)
    assert float(orthogonality_error(v, b)) == pytest.approx(error_law(s), rel=1e-6, abs=1e-13)


def test_the_worst_block_is_the_one_reported():
    v = torch.cat([vectors(3, 8, 0.01), vectors(1, 8, 0.1)])
    assert orthogonality_error(v, 8) == orthogonality_error(v[3:], 8) > orthogonality_error(v[:3], 8)
    torch.testing.assert_close(skew_norm(v, 8), torch.linalg.matrix_norm(skew(v, 8), 2).max())


def test_measuring_leaves_no_trace_in_autograd():
    v = vectors(2, 8, dtype=torch.bfloat16).requires_grad_()
    for measured in (orthogonality_error(v, 8), skew_norm(v, 8)):
        assert measured.dim() == 0 and measured.dtype == torch.float64 and not measured.requires_grad


def test_indices_first_made_in_inference_mode_serve_training_later():
    with torch.inference_mode():
        cayley_neumann(torch.zeros(1, 21 * 20 // 2), 21)
    v = torch.zeros(1, 210, requires_grad=True)
    rotate(torch.randn(2, 21), cayley_neumann(v, 21)).sum().backward()
    skew(v, 21).sum().backward()
    assert v.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_device_rotates_and_differentiates_alike(dtype):
    v, x = vectors(4, 32, 0.03, dtype), torch.randn(5, 128, dtype=torch.float64).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        leaf, moved = (tensor.clone().to(device).requires_grad_() for tensor in (v, x))
        y = rotate(moved, cayley_neumann(leaf, 32))
        y.square().sum().backward()
        results.append([tensor.detach().cpu() for tensor in (y, leaf.grad, moved.grad, orthogonality_error(leaf, 32))])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, rtol=tolerance, atol=tolerance)


def peft_layer(n: int, b: int, out: int, weight: torch.Tensor, v: torch.Tensor):
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(n * b, out, bias=False))
    base[0].weight.data.copy_(weight)
    config = peft.OFTConfig(oft_block_size=b, target_modules=["0"], use_cayley_neumann=True, num_cayley_neumann_terms=5)
    model = peft.get_peft_model(base, config)
    model.base_model.model[0].oft_R["default"].weight.data.copy_(v)
    return model


@pytest.mark.parametrize("n, b", [(4, 32), (12, 32), (8, 16), (3, 8)])
def test_peft_computes_the_same_outputs_gradients_and_merged_weight(n, b):
    v = vectors(n, b, 0.03, torch.float32)
    weight, x = torch.randn(48, n * b) * 0.05, torch.randn(2, 7, n * b)
    model = peft_layer(n, b, 48, weight, v)
    layer = model.base_model.model[0]
    parameter = layer.oft_R["default"].weight
    torch.testing.assert_close(
        cayley_neumann(v, b), layer.oft_R["default"]._cayley_batch(parameter, b), rtol=0, atol=1e-6
    )

    mine, x_mine, x_theirs = v.clone().requires_grad_(), x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = rotate(x_mine, cayley_neumann(mine, b)) @ weight.T
    theirs = model(x_theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(ours)
    ours.backward(dy)
    theirs.backward(dy)
    torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_mine.grad, x_theirs.grad, rtol=1e-5, atol=1e-5)

    merged = model.merge_and_unload()[0].weight
    torch.testing.assert_close(weight @ torch.block_diag(*cayley_neumann(v, b)).T, merged, rtol=1e-5, atol=1e-6)


def test_a_block_size_that_does_not_divide_the_width_is_an_error_and_never_adjusted():
    assert block_count(384, 32) == 12
    with pytest.raises(ValueError, match="block size b = 48 must be at least 2 and divide the input width 128"):
        block_count(128, 48)
    with pytest.raises(ValueError, match="2 blocks of block size b = 48 cover 96; input width is 128"):
        rotate(torch.zeros(1, 128), torch.zeros(2, 48, 48))


def test_wrong_shapes_are_named():
    for call, message in [
        (lambda: skew(torch.zeros(3, 5), 4), r"b = 4: expected vectors of length 6; found \(3, 5\)"),
        (lambda: cayley_neumann(torch.zeros(3, 5), 4), r"b = 4: expected vectors of length 6; found \(3, 5\)"),
        (lambda: cayley_neumann(torch.zeros(6), 4), r"expected v\[n, b\(b-1\)/2\]; found \(6,\)"),
        (lambda: skew(torch.zeros(3, 0), 1), "b = 1"),
        (lambda: rotate(torch.zeros(3, 8), torch.zeros(2, 4, 3)), r"expected \[n, b, b\]; found \(2, 4, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
