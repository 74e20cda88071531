"""What the fast paths of experts and of Cayley-Neumann promise; run by test_fast_paths.py as fast_suite.py is."""

from __future__ import annotations

import pytest
import torch
from fast_suite import DEVICE, FLOAT, GPU, by_format, error, on_gpu, packed_weight
from orbit_kernels import FORMATS, PackedStack, dequantize, grouped_linear, oft
from orbit_kernels.fast import cayley, grouped_bf16, grouped_packed
from orbit_kernels.fast.dispatch import named
from orbit_kernels.fast.grouped import grouped_product, supports
from orbit_kernels.fast.packed_launch import Cut
from orbit_kernels.fast.schedule import schedule
from random_weights import FUSED, extremes, random_packed, stack_of

RAGGED = [0, 5, 0, 200, 64, 1, 0, 333, 128, 0] if GPU else [0, 5, 0, 34, 16, 0]


def counted(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts, device=DEVICE)


def by_expert(x: torch.Tensor, counts: list[int], dense: list[torch.Tensor], turned: bool) -> torch.Tensor:
    """One product per expert in the dtype of the weights."""
    parts = x.to(dense[0].dtype).split(counts)
    return torch.cat([part @ (weight if turned else weight.T) for part, weight in zip(parts, dense, strict=True)])


@pytest.mark.parametrize("counts", [RAGGED, [0, 0, 7], [0, 0, 0], [16, 16], [3]])
@pytest.mark.parametrize("block", [16, 64])
def test_a_schedule_covers_every_row_once_and_knows_its_group(counts, block):
    rows = sum(counts)
    table = schedule(counted(counts), rows, block).tolist()
    covered = [
        (group, row) for group, first, end in table if group >= 0 for row in range(first, min(first + block, end))
    ]
    assert covered == [(g, sum(counts[:g]) + i) for g, count in enumerate(counts) for i in range(count)]
    assert len(table) == rows // block + len(counts)


@by_format
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
def test_grouped_products_are_those_with_the_dequantised_experts(spec, turned):
    out, width = (768, 512) if GPU else (128, 256)
    stack = PackedStack.of([packed_weight(spec, out, width) for _ in RAGGED])
    assert supports(stack)
    x = torch.randn(sum(RAGGED), out if turned else width, device=DEVICE).to(FLOAT)
    dense = [dequantize(stack[e], FLOAT) for e in range(len(RAGGED))]
    exact = by_expert(x.double(), RAGGED, [weight.double() for weight in dense], turned)
    theirs = error(by_expert(x, RAGGED, dense, turned), exact)
    for block in (16, 64, 128) if GPU else (16,):
        found = grouped_product(x, counted(RAGGED), stack, turned, block)
        assert error(found, exact) <= max(1.02 * theirs, 1e-6)


fused = pytest.mark.parametrize("spec", FUSED, ids=named)
fused_or_dense = pytest.mark.parametrize("spec", [*FUSED, FORMATS["bf16"]], ids=named)


@on_gpu
@fused
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("shape", [(768, 512), (128, 256), (256, 2048)])
def test_the_fused_product_gives_the_bits_of_the_general_one(spec, turned, shape):
    stack = PackedStack.of([extremes(random_packed(spec, *shape, DEVICE))[0] for _ in RAGGED])
    x = torch.randn(sum(RAGGED), shape[0] if turned else shape[1], device=DEVICE).to(FLOAT)
    general = grouped_product(x, counted(RAGGED), stack, turned, 64)
    assert grouped_packed.supports(stack)
    made = shape[1] if turned else shape[0]
    for cut in (None, Cut(128, 128, 64), Cut(128, 256, 128), Cut(256, 128, 128)):
        if cut is None or made % cut.outs == 0:
            assert torch.equal(grouped_packed.grouped_packed(x, counted(RAGGED), stack, turned, cut), general)


@on_gpu
@fused_or_dense
def test_grouped_rows_have_the_same_bits_in_any_company_and_in_every_run(spec):
    stack = stack_of(spec, 512, 768, len(RAGGED), DEVICE)
    x = torch.randn(sum(RAGGED), 768, device=DEVICE).to(FLOAT)
    whole = grouped_linear(x, counted(RAGGED), stack)
    assert torch.equal(whole, grouped_linear(x, counted(RAGGED), stack))
    first = sum(RAGGED[:7])
    alone = grouped_linear(x[first : first + 9], counted([9 if e == 7 else 0 for e in range(len(RAGGED))]), stack)
    assert torch.equal(alone, whole[first : first + 9])


@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("shape", [(2048, 768), (40, 72)] if GPU else [(40, 72)])
def test_bf16_experts_are_multiplied_by_torch_for_widths_of_whole_pieces(turned, shape):
    stack = PackedStack.of([packed_weight(FORMATS["bf16"], *shape) for _ in RAGGED])
    assert grouped_bf16.supports(stack)
    x = torch.randn(sum(RAGGED), shape[0] if turned else shape[1], device=DEVICE).bfloat16()
    dense = [stack[e].tensors["weight"] for e in range(len(RAGGED))]
    exact = by_expert(x.double(), RAGGED, [weight.double() for weight in dense], turned)
    found = grouped_product(x, counted(RAGGED), stack, turned)
    assert error(found, exact) <= 1.02 * error(by_expert(x, RAGGED, dense, turned), exact)


@on_gpu
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("shape", [(2048, 768), (40, 72), (136, 2048)])
def test_bf16_experts_keep_a_rows_bits_whatever_tiles_torch_chooses(turned, shape):
    """It takes others from 128 rows an expert on."""
    stack = PackedStack.of([packed_weight(FORMATS["bf16"], *shape) for _ in range(3)])
    x = torch.randn(1500, shape[0] if turned else shape[1], device=DEVICE).to(FLOAT)
    whole = grouped_product(x, counted([700, 0, 800]), stack, turned)
    for first, count in ((0, 700), (0, 1), (3, 64), (130, 130)):
        alone = grouped_product(x[first : first + count], counted([count, 0, 0]), stack, turned)
        assert torch.equal(alone, whole[first : first + count])
    few = grouped_product(x[690:710], counted([10, 0, 10]), stack, turned)
    assert torch.equal(few, whole[690:710])


@on_gpu
def test_bf16_experts_that_lie_askew_or_are_too_narrow_still_get_their_product():
    counts, x = [5, 0, 11], torch.randn(16 * 64 + 1, device=DEVICE).to(FLOAT)[1:].view(16, 64)
    for out in (12, 40):
        stack = PackedStack.of([packed_weight(FORMATS["bf16"], out, 64) for _ in counts])
        found = grouped_linear(x, counted(counts), stack)
        dense = [stack[e].tensors["weight"] for e in range(3)]
        exact = by_expert(x.double(), counts, [weight.double() for weight in dense], False)
        assert error(found, exact) <= 1.02 * error(by_expert(x, counts, dense, False), exact)


@on_gpu
@fused_or_dense
def test_grouped_linear_is_captured_and_replayed_for_other_counts(spec):
    stack = stack_of(spec, 512, 768, 3, DEVICE)
    x = torch.randn(96, 768, device=DEVICE).to(FLOAT)
    counts = counted([32, 32, 32])
    grouped_linear(x, counts, stack)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = grouped_linear(x, counts, stack)
    for split in ([96, 0, 0], [1, 95, 0], [0, 40, 56]):
        counts.copy_(counted(split))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, grouped_linear(x, counted(split), stack))


@on_gpu
@fused_or_dense
def test_the_gradient_of_grouped_linear_is_that_of_one_linear_per_expert(spec):
    stack = stack_of(spec, 512, 768, len(RAGGED), DEVICE)
    x = torch.randn(sum(RAGGED), 768, device=DEVICE, dtype=FLOAT, requires_grad=True)
    dy = torch.randn(sum(RAGGED), 512, device=DEVICE, dtype=FLOAT)
    (dx,) = torch.autograd.grad(grouped_linear(x, counted(RAGGED), stack), x, dy)
    dense = [dequantize(stack[e], FLOAT) for e in range(len(RAGGED))]
    exact = by_expert(dy.double(), RAGGED, [weight.double() for weight in dense], True)
    assert error(dx, exact) <= 1.02 * error(by_expert(dy, RAGGED, dense, True), exact)


@pytest.mark.parametrize("b", [16, 32, 64])
@pytest.mark.parametrize("strength", [1e-3, 0.05])
def test_cayley_neumann_and_its_gradient_equal_the_reference_within_float32(b, strength):
    cayley_equals_the_reference(b, 70 if GPU else 2, strength)


def cayley_equals_the_reference(b: int, blocks: int, strength: float) -> None:
    v = torch.randn(blocks, b * (b - 1) // 2, device=DEVICE) * strength
    dR = torch.randn(blocks, b, b, device=DEVICE)

    def by_reference(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = v.to("cpu", dtype).requires_grad_()
        R = oft.cayley_neumann(leaf, b)
        return R.detach().to(DEVICE), torch.autograd.grad(R, leaf, dR.to("cpu", dtype))[0].to(DEVICE)

    if b > 128:
        R, *kept = cayley.forward_kept(v, b, v.dtype)
        assert torch.equal(R, cayley.forward(v, b))  # in turns, through a scratch
        found = R, oft.cayley_gradient(*kept, dR)
    else:
        found = cayley.forward(v, b), cayley.backward(v, dR, b)
    for ours, theirs, exact in zip(found, by_reference(torch.float32), by_reference(torch.float64), strict=True):
        assert error(ours, exact) <= max(2 * error(theirs, exact), 1e-6)


@on_gpu
def test_cayley_neumann_by_the_front_door_is_deterministic_in_both_dtypes():
    for dtype in (torch.float32, torch.bfloat16):
        v = (torch.randn(300, 496, device=DEVICE) * 0.02).to(dtype).requires_grad_()
        first, second = oft.cayley_neumann(v, 32), oft.cayley_neumann(v, 32)
        grads = [torch.autograd.grad(R, v, torch.ones_like(R))[0] for R in (first, second)]
        assert torch.equal(first, second) and torch.equal(*grads) and first.dtype == grads[0].dtype == dtype
