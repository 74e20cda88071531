"""What the fast paths of adapters promise; run by test_fast_paths.py as fast_suite.py is."""

from __future__ import annotations

import pytest
import torch
from fast_suite import DEVICE, FLOAT, GPU, decodable, error, on_gpu
from grouped_suite import cayley_equals_the_reference
from orbit_kernels import FORMATS, dequantize, lora_linear, oft, oft_linear
from orbit_kernels.fast.decode import Adapter, Plan, decode
from orbit_kernels.fast.low_rank import add_low_rank
from orbit_kernels.fast.rotate import Choice, turn, turn_backward

SPEC = FORMATS["int4"]
COUNTS = [0, 70, 3, 128, 0] if GPU else [0, 5, 2, 0]


def rotations(width: int, b: int, *layers: int) -> torch.Tensor:
    v = torch.randn(max(1, *layers, 1) * (width // b), b * (b - 1) // 2, device=DEVICE) * (0.2 / b**0.5)
    return oft.cayley_neumann(v, b).to(FLOAT).view(*layers, width // b, b, b)


def turned(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    b = R.shape[-1]
    return torch.einsum("tnb,nbc->tnc", x.unflatten(-1, (-1, b)), R).flatten(1)


def no_worse(found, theirs, exact) -> None:
    for ours, other, right in zip(found, theirs, exact, strict=True):
        assert ours.shape == right.shape
        assert error(ours, right) <= max(1.02 * error(other, right), 1e-6)


def differentiated(function, x: torch.Tensor, R: torch.Tensor, dys: list[torch.Tensor], dtype: torch.dtype):
    """Results and gradients of a reference in `dtype`."""
    a, r = x.to(dtype).requires_grad_(), R.to(dtype).requires_grad_()
    results = function(a, r)
    grads = torch.autograd.grad(results, (a, r), [dy.to(dtype) for dy in dys])
    return [result.detach() for result in results] + list(grads)


@pytest.mark.parametrize("b", [16, 32, 128, 256] if GPU else [16, 256])
def test_rows_sorted_by_expert_are_turned_by_its_rotation_with_both_gradients(b):
    width, tokens = (1280 if GPU else max(b, 32)), sum(COUNTS)
    R, counts = rotations(width, b, len(COUNTS)), torch.tensor(COUNTS, device=DEVICE)
    x, dy = (torch.randn(tokens, width, device=DEVICE).to(FLOAT) for _ in range(2))

    def reference(a, r):
        return [torch.cat([turned(part, r[e]) for e, part in enumerate(a.split(COUNTS))])]

    found = [turn(x, R, Choice(counts=counts)), *turn_backward(x, R, [dy], Choice(counts=counts))]
    no_worse(found, *(differentiated(reference, x, R, [dy], dtype) for dtype in (FLOAT, torch.float64)))


@pytest.mark.parametrize("b", [16, 32, 64, 128] if GPU else [16])
@pytest.mark.parametrize("slices", [2, 3])
def test_one_input_is_turned_by_several_rotations_at_once_and_its_gradient_summed(b, slices):
    width, tokens = (1280, 777) if GPU else (96, 70)
    R = rotations(width, b, slices)
    x, *dys = (torch.randn(tokens, width, device=DEVICE).to(FLOAT) for _ in range(slices + 1))

    def reference(a, r):
        return [turned(a, one) for one in r]

    found = [*turn(x, R, sliced=True), *turn_backward(x, R, dys)]
    no_worse(found, *(differentiated(reference, x, R, dys, dtype) for dtype in (FLOAT, torch.float64)))


def test_a_slot_is_looked_up_on_the_device():
    width, b = (1280, 32) if GPU else (128, 16)
    R, slot = rotations(width, b, 3), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    x = torch.randn(9, width, device=DEVICE).to(FLOAT)
    for index in (0, 2, 1):
        slot.fill_(index)
        assert torch.equal(turn(x, R, Choice(slot)), turn(x, R[index]))
        back = turn_backward(x, R, [x], Choice(slot), need_dR=False)[0]
        assert torch.equal(back, turn_backward(x, R[index], [x], need_dR=False)[0])


@pytest.mark.parametrize("b", [64, 128, 256] if GPU else [128, 256])
def test_wide_cayley_neumann_and_its_gradient_equal_the_reference_within_float32(b):
    cayley_equals_the_reference(b, 300 if GPU else 1, 0.02)


@on_gpu
@pytest.mark.parametrize("b", [32, 128])
def test_gradients_of_rotations_are_the_same_in_every_run(b):
    R = rotations(2560, b, 2).requires_grad_()
    x = torch.randn(3000, 2560, device=DEVICE, dtype=FLOAT, requires_grad=True)
    counts = torch.tensor([1000, 2000], device=DEVICE)

    def runs(function):
        for _ in range(3):
            results = function()
            yield [*results, *torch.autograd.grad(results, (x, R), [torch.ones_like(y) for y in results])]

    for function in (lambda: oft.rotate_slices(x, R), lambda: [oft.rotate(x, R, counts=counts)]):
        first, *others = runs(function)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def low_rank(out: int, width: int, rank: int, *slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = torch.randn(*slots, rank, width, device=DEVICE), torch.randn(*slots, out, rank, device=DEVICE)
    return (A / width**0.5).to(FLOAT), (B * 0.2).to(FLOAT)


def adapters(out: int, width: int) -> list[Adapter]:
    slot = torch.ones(1, dtype=torch.int32, device=DEVICE)
    if not GPU:
        return [Adapter(rotations(width, 64, 2), slot=slot), Adapter(*low_rank(out, width, 8), 0.7)]
    found = [Adapter(rotations(width, b)) for b in (32, 128)]
    found += [Adapter(rotations(width, b, 2), slot=slot) for b in (16, 256)]
    return [*found, Adapter(*low_rank(out, width, 8), 0.7), Adapter(*low_rank(out, width, 64, 2), 0.7, slot)]


def adapted(x: torch.Tensor, dense: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """The formula, an operation after the other in the dtype of what comes."""
    a, b = (None if each is None else each.to(x.dtype) for each in adapter[:2])
    if adapter.slot is not None:
        a, b = a[1], None if b is None else b[1]
    if b is None:
        return turned(x, a) @ dense.T
    return x @ dense.T + (x @ a.T @ b.T) * adapter.scaling


@pytest.mark.parametrize("chosen", [None, Plan(2, False, 2), Plan(2, True, 2, arranged=True)])
def test_decode_with_an_adapter_is_the_formula(chosen):
    out, width, tokens = (768, 2560, 13) if GPU else (64, 512, 3)
    packed = decodable(SPEC, out, width)
    dense = dequantize(packed, FLOAT)
    x = torch.randn(tokens, width, device=DEVICE).to(FLOAT)
    for adapter in adapters(out, width):
        exact = adapted(x.double(), dense.double(), adapter)
        theirs = error(adapted(x, dense, adapter), exact)
        for _ in range(2):  # counts are back at zero
            assert error(decode(x, packed, None, chosen, adapter), exact) <= max(1.02 * theirs, 1e-6)


def test_an_adapters_sum_has_the_same_bits_whether_x_was_arranged_or_not():
    out, width = (768, 2560) if GPU else (64, 512)
    packed = decodable(SPEC, out, width)
    for adapter in adapters(out, width):
        for _ in range(5):
            x = torch.randn(13 if GPU else 3, width, device=DEVICE).to(FLOAT)
            plans = [Plan(2, True, 2, arranged=how) for how in (False, True)]
            assert torch.equal(*(decode(x, packed, None, plan, adapter) for plan in plans))


@on_gpu
@pytest.mark.parametrize("shape", [(9728, 2560), (2560, 9728), (1024, 2560)])
def test_a_row_decoded_with_an_adapter_has_the_same_bits_in_any_batch_and_in_every_run(shape):
    packed = decodable(SPEC, *shape)
    for adapter in adapters(*shape):
        for _ in range(20 if adapter.b is not None else 1):  # another order of LoRA's sum shows in few rows
            x = torch.randn(64, shape[1], device=DEVICE).to(FLOAT)
            whole = decode(x, packed, adapter=adapter)
            for tokens in (1, 2, 9, 16, 17, 32, 33, 64):
                assert torch.equal(decode(x[:tokens], packed, adapter=adapter), whole[:tokens])
        if adapter.b is None:
            R = adapter.a if adapter.slot is None else adapter.a[1]
            assert torch.equal(whole, decode(oft.rotate(x, R), packed))


@on_gpu
def test_few_tokens_are_rotated_to_the_bits_of_many():
    for b in (16, 32, 64, 128, 256):
        R = rotations(2560, b)
        x = torch.randn(200, 2560, device=DEVICE).to(FLOAT)
        many = oft.rotate(x, R)
        assert all(torch.equal(oft.rotate(x[:tokens], R), many[:tokens]) for tokens in (1, 16, 17, 64))


@on_gpu
def test_a_captured_chain_follows_its_slot_and_its_values():
    up, down = decodable(SPEC, 5120, 2048), decodable(SPEC, 2048, 5120)
    slot = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    R, (A, B) = rotations(2048, 32, 2), low_rank(2048, 5120, 16, 2)
    x = torch.randn(4, 2048, device=DEVICE, dtype=FLOAT)

    def chain() -> torch.Tensor:
        h = x
        for _ in range(3):
            h = oft_linear(h, up, R, slot=slot)
            h = lora_linear(h, down, A, B, 0.5, slot=slot)
        return h

    chain()  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for index in (0, 1, 1, 0):
        x.normal_()
        slot.fill_(index)
        R.add_(torch.randn_like(R) * 0.01)
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        h = x
        for _ in range(3):
            h = oft_linear(h, up, R[index].clone())
            torch.cuda.synchronize()
            h = lora_linear(h, down, A[index].clone(), B[index].clone(), 0.5)
            torch.cuda.synchronize()
        assert torch.equal(y, h)


@on_gpu
@pytest.mark.parametrize("tokens", [300, 40])
def test_lora_on_a_packed_linear_and_its_gradients_are_no_worse_than_torch(tokens):
    packed, (A, B) = decodable(SPEC, 1024, 768), low_rank(1024, 768, 16)
    dense = dequantize(packed)
    x, dy = torch.randn(tokens, 768, device=DEVICE).to(FLOAT), torch.randn(tokens, 1024, device=DEVICE).to(FLOAT)

    def of(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [each.to(dtype).requires_grad_() for each in (x, A, B)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def formula(x, A, B):
        return x @ dense.to(x.dtype).T + (x @ A.T @ B.T) * 0.5

    found = of(lambda x, A, B: lora_linear(x, packed, A, B, 0.5), FLOAT)
    no_worse(found, of(formula, FLOAT), of(formula, torch.float64))


def test_a_low_rank_product_is_added_in_place():
    y, t = torch.randn(70, 300, device=DEVICE).to(FLOAT), torch.randn(70, 8, device=DEVICE).to(FLOAT)
    for B in (torch.randn(300, 8, device=DEVICE).to(FLOAT), torch.randn(8, 300, device=DEVICE).to(FLOAT).t()):
        exact = y.double() + 0.5 * t.double() @ B.double().T
        theirs = error(y + 0.5 * t @ B.T, exact)
        assert error(add_low_rank(y.clone(), t, B, 0.5), exact) <= max(1.02 * theirs, 1e-6)
