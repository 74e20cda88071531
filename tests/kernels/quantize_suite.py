"""Quantisation kernels make the bytes of the references; run by test_fast_paths.py, interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch
from fast_suite import DEVICE, GPU, SPECS, on_gpu
from orbit_kernels import FormatError, FormatSpec, PackedWeight, quantize
from orbit_kernels.fast.quantize import quantize as fast_quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16] if GPU else [torch.float32]
by_format = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.group_size}")


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a weight may look like, its magnitudes as wide as the dtype."""
    rows, width = (384, 1280) if GPU else (9, 256)
    usual = torch.randn(rows, width) * 0.05
    usual[0, :128] = 0.0
    usual[1] = -0.0
    usual[2, 5] = 40.0
    limit = torch.finfo(dtype)
    low, high = torch.tensor(limit.smallest_normal / 64).log2(), torch.tensor(limit.max).log2()
    spread = torch.exp2(low + (high - low) * torch.rand(rows, width)) * torch.randn(rows, width).sign()
    steps = torch.randint(-28, 29, (rows, width)) / 4.0  # ties of every format under scales that are powers of two
    steps[:, ::16] = 6.0
    top = torch.full((rows, width), limit.max) * torch.randn(rows, width).sign()
    some = {
        "usual": usual,
        "spread": spread,
        "tiny": usual * limit.smallest_normal,
        "steps": steps,
        "halves": torch.randint(-15, 16, (rows, width)) / 2.0,
        "top": top,
        "zeros": torch.zeros(rows, width),
        "sevenths": torch.rand(rows, width).mul(15).round() * 0.5 - 3.75,
    }
    return {name: values.clamp(-limit.max, limit.max).to(dtype) for name, values in some.items()}


def assert_same(found: PackedWeight, expected: PackedWeight, what: str) -> None:
    assert found.shape == expected.shape and list(found.tensors) == list(expected.tensors)
    for key, tensor in expected.tensors.items():
        mine = found.tensors[key].cpu()
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape, (what, key)
        assert torch.equal(mine.view(torch.uint8), tensor.view(torch.uint8)), (what, key)


@by_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_those_of_the_reference_on_a_cpu(spec: FormatSpec, dtype: torch.dtype) -> None:
    for what, values in weights(dtype).items():
        found = fast_quantize(values.to(DEVICE), spec)
        assert_same(found, quantize(values, spec), what)


@by_format
def test_a_weight_that_is_not_contiguous_or_whole_tiles(spec: FormatSpec) -> None:
    rows, width = (131, 1280) if GPU else (3, 256)
    values = torch.randn(width, rows).T
    assert_same(fast_quantize(values.to(DEVICE), spec), quantize(values, spec), "turned")
    if spec.name == "fp8":
        ragged = torch.randn(130 if GPU else 5, 200)
        assert_same(fast_quantize(ragged.to(DEVICE), spec), quantize(ragged, spec), "ragged")


@by_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_wherever_it_stands(spec: FormatSpec, bad: float) -> None:
    values = torch.randn(8, 256)
    values[7, 255] = bad
    with pytest.raises(FormatError, match="finite numbers in float32; found NaN or infinity"):
        fast_quantize(values.to(DEVICE), spec)


@on_gpu
@by_format
def test_the_door_takes_the_kernel_and_repeats_itself(spec: FormatSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from orbit_kernels import fast

    calls = []
    monkeypatch.setattr(fast, "quantize", lambda *given: calls.append(given) or fast_quantize(*given))
    values = torch.randn(4096, 2560, device=DEVICE).bfloat16()
    first, again = quantize(values, spec), quantize(values, spec)
    assert len(calls) == 2
    assert_same(first, again.to("cpu"), "again")
    assert_same(first, quantize(values.cpu(), spec), "a whole weight")
    wide = values[:128].double()  # float64 is the reference's
    assert_same(quantize(wide, spec), quantize(wide.cpu(), spec), "float64")
    assert len(calls) == 2
