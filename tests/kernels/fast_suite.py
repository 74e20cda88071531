"""What the fast paths promise, held to the references; run by test_fast_paths.py, in Triton's interpreter or on a GPU.

The interpreter truncates where bfloat16 should round, so there tensors are float32, the scales of INT4 float16, and
shapes as small as the kernels take; on a GPU they are bfloat16 and of real size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from orbit_kernels import FORMATS, FormatSpec, PackedWeight, linear, oft, quantize
from orbit_kernels import dequantize as reference_dequantize
from orbit_kernels.fast import dequantize
from orbit_kernels.fast.decode import Plan, decode, plan
from orbit_kernels.fast.dispatch import MOST, choose
from orbit_kernels.fast.rotate import turn, turn_backward

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FLOAT = torch.bfloat16 if GPU else torch.float32
SPECS = [FORMATS["int4"], FormatSpec("int4", 128), FORMATS["nvfp4"], FORMATS["mxfp4"], FORMATS["fp8"]]
by_format = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}-{spec.group_size}")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


def weight(out: int, width: int) -> torch.Tensor:
    values = torch.randn(out, width, device=DEVICE) * 0.05
    values[0, :32] = 0.0
    values[1, 1] = 3.0
    return values


def packed_weight(spec: FormatSpec, out: int, width: int) -> PackedWeight:
    packed = quantize(weight(out, width), spec)
    if GPU or spec.name != "int4":
        return packed
    return replace(packed, tensors=packed.tensors | {"weight_scale": packed.tensors["weight_scale"].half()})


def replays_alike(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> None:
    """Captures a run in a graph and replays it over results that are spoilt."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@by_format
def test_dequantize_gives_the_bits_of_the_reference_whole_and_in_parts(spec):
    shape = (640, 1280) if GPU else (40, 256)
    packed = packed_weight(spec, *shape)
    dense = reference_dequantize(packed, FLOAT)
    out = torch.full_like(dense, float("nan"))
    assert torch.equal(dequantize(packed, out=out), dense)
    for rows, cols in [((8, 24), (0, shape[1])), ((0, shape[0]), (128, 256)), ((16, 40), (128, 192))]:
        part = torch.full_like(dense[rows[0] : rows[1], cols[0] : cols[1]], float("nan")).contiguous()
        assert torch.equal(dequantize(packed, rows, cols, part), dense[rows[0] : rows[1], cols[0] : cols[1]])


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_dequantize_knows_every_code_under_extreme_scales(name):
    """All 16 codes in each group, scales at both ends of their range."""
    words = torch.tensor([0x76543210, 0xFEDCBA98 - 2**32] * 4, dtype=torch.int32, device=DEVICE).repeat(8, 1)
    width, spec = 64, FORMATS[name]
    groups = (8, width // spec.group_size)
    if name == "int4":
        scale = torch.tensor([2.0**-20, 3.1e4], device=DEVICE).to(torch.bfloat16 if GPU else torch.float16)
        tensors = {"weight_packed": words, "weight_scale": scale.repeat(8, 1), "weight_shape": torch.tensor([8, width])}
    elif name == "mxfp4":
        exponents = torch.tensor([0, 1, 2, 127, 130, 250, 251, 252], dtype=torch.uint8, device=DEVICE)
        tensors = {"weight_packed": words.view(torch.uint8), "weight_scale": exponents[:, None].repeat(1, groups[1])}
    else:
        scale = torch.tensor([2.0**-9, 2.0**-6, 1.0, 448.0], device=DEVICE).to(torch.float8_e4m3fn)
        scale = scale.view(torch.uint8).repeat(8, 1).view(torch.float8_e4m3fn)
        whole = torch.tensor([3.7], device=DEVICE)
        tensors = {"weight_packed": words.view(torch.uint8), "weight_scale": scale, "weight_global_scale": whole}
    packed = PackedWeight(spec, (8, width), tensors)
    dense = reference_dequantize(packed, FLOAT)
    assert torch.equal(dequantize(packed, out=torch.full_like(dense, float("nan"))), dense)


@on_gpu
def test_every_fp8_code_is_decoded_exactly():
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    codes[[0x7F, 0xFF]] = 0  # NaN, which no weight may hold
    codes = codes.repeat(128, 1).view(torch.float8_e4m3fn)
    for scale in (torch.float32, torch.bfloat16):
        scales = torch.tensor([[1e-30, 1.7e3]], device=DEVICE).to(scale)
        packed = PackedWeight(FORMATS["fp8"], (128, 256), {"weight": codes, "weight_scale": scales})
        assert torch.equal(dequantize(packed), reference_dequantize(packed))


def decodable(spec: FormatSpec, out: int, width: int) -> PackedWeight:
    """A weight that the decode kernel takes; in the interpreter bfloat16 scales become float32, of equal value."""
    packed = quantize(weight(out, width), spec)
    if GPU or spec.name != "int4":
        return packed
    return replace(packed, tensors=packed.tensors | {"weight_scale": packed.tensors["weight_scale"].float()})


def modelopt(packed: PackedWeight) -> PackedWeight:
    """An NVFP4 weight in ModelOpt's spelling."""
    stored = packed.tensors
    spelled = {"weight": stored["weight_packed"], "weight_scale": stored["weight_scale"]}
    return replace(packed, tensors=spelled | {"weight_scale_2": stored["weight_global_scale"].reciprocal()})


@by_format
@pytest.mark.parametrize("chosen", [None, Plan(2, False, 2), Plan(2, True, 2, arranged=True)])
def test_decode_is_the_product_with_the_dequantised_weight(spec, chosen):
    out, width, tokens = (768, 2560, 13) if GPU else (64, 512, 3)
    packed = decodable(spec, out, width)
    x, bias = torch.randn(tokens, width, device=DEVICE).to(FLOAT), torch.randn(out, device=DEVICE).to(FLOAT)
    for one in (packed, modelopt(packed)) if spec.name == "nvfp4" else (packed,):
        dense = reference_dequantize(one, FLOAT)
        for b in (None, bias):
            exact = x.double() @ dense.double().T + (0 if b is None else b.double())
            theirs = torch.nn.functional.linear(x, dense, b)
            assert error(decode(x, one, b, chosen), exact) <= max(1.02 * error(theirs, exact), 1e-6)


@on_gpu
@by_format
def test_decode_of_unit_vectors_gives_the_bits_of_the_dequantised_weight(spec):
    """Every code under scales of every size: a row of x that is 1 in one column picks one element of each row of W."""
    packed = quantize(torch.randn(256, 512, device=DEVICE) * torch.logspace(-6, 3, 512, device=DEVICE), spec)
    codes = next(tensor for tensor in packed.tensors.values() if tensor.shape[0] == 256)
    raw = codes.view(torch.uint8)
    raw.random_(0, 256)
    if spec.name == "fp8":
        raw[raw & 0x7F == 0x7F] = 0  # NaN, which no weight may hold
    for one in (packed, modelopt(packed)) if spec.name == "nvfp4" else (packed,):
        dense = reference_dequantize(one)
        columns = torch.eye(512, device=DEVICE, dtype=FLOAT).split(64)
        found = torch.cat([linear(part, one) for part in columns]).T
        assert torch.equal(found, dense)


@on_gpu
@pytest.mark.parametrize("whole", [3e-4, 0.37, 1.0, 1093.5, 2e5])
def test_decode_knows_every_nvfp4_scale(whole):
    codes = torch.randint(0, 256, (128, 1024), dtype=torch.uint8, device=DEVICE)
    scales = (torch.arange(128 * 128, device=DEVICE) % 127).to(torch.uint8).view(128, 128)
    stored = {"weight_packed": codes, "weight_scale": scales.view(torch.float8_e4m3fn)}
    packed = PackedWeight(
        FORMATS["nvfp4"], (128, 2048), stored | {"weight_global_scale": torch.full((1,), whole, device=DEVICE)}
    )
    columns = torch.eye(2048, device=DEVICE, dtype=FLOAT).split(64)
    for one in (packed, modelopt(packed)):
        assert torch.equal(torch.cat([linear(part, one) for part in columns]).T, reference_dequantize(one))


def test_arrivals_are_reset_so_that_a_second_call_is_right_too():
    packed = decodable(FORMATS["int4"], 64, 512)
    x = torch.randn(2, 512, device=DEVICE).to(FLOAT)
    first, second = (decode(x, packed, chosen=Plan(2, False, 2)) for _ in range(2))
    assert torch.equal(first, second) and bool(first.any())


def test_how_a_weight_is_cut_does_not_depend_on_the_number_of_tokens():
    for shape in [(9728, 2560), (2560, 9728), (4096, 2560), (7168, 2048), (2048, 7168), (64, 256)]:
        assert len({plan(*shape, tokens, 128).parts for tokens in range(1, 65)}) == 1


@pytest.mark.parametrize("b", [16, 32, 64, 128, 256] if GPU else [16, 128])
def test_rotation_and_its_gradients_equal_the_reference(b):
    width, tokens = (1280 if b < 128 else 2560, 777) if GPU else (128 if b == 128 else 160, 5)
    R = oft.cayley_neumann(torch.randn(width // b, b * (b - 1) // 2, device=DEVICE) * 0.02, b).to(FLOAT)
    x, dy = (torch.randn(tokens, width, device=DEVICE).to(FLOAT) for _ in range(2))

    def by_reference(dtype: torch.dtype) -> list[torch.Tensor]:
        a, r = x.to(dtype).requires_grad_(), R.to(dtype).requires_grad_()
        blocks = torch.einsum("tnb,nbc->tnc", a.unflatten(1, (-1, b)), r).flatten(1)
        return [blocks.detach(), *torch.autograd.grad(blocks, (a, r), dy.to(dtype))]

    found = [turn(x, R), *turn_backward(x, R, [dy])]
    for ours, theirs, exact in zip(found, by_reference(FLOAT), by_reference(torch.float64), strict=True):
        assert ours.shape == exact.shape
        assert error(ours, exact) <= max(1.02 * error(theirs, exact), 1e-6)


@on_gpu
@by_format
@pytest.mark.parametrize("shape", [(9728, 2560), (2560, 9728), (4096, 2560), (1024, 768)])
def test_a_row_has_the_same_bits_whatever_the_batch_and_in_every_run(shape, spec):
    packed = quantize(weight(*shape), spec)
    x = torch.randn(64, shape[1], device=DEVICE).to(FLOAT)
    whole, alike = linear(x, packed), {}
    for tokens in (64, 33, 32, 17, 16, 9, 8, 5, 2, 1):
        way = choose("forward", packed, tokens)
        most = alike.setdefault(way, tokens)  # where another way is faster for many rows, its bits are its own
        expected = linear(x[:most], packed)
        assert torch.equal(linear(x[:tokens], packed), expected[:tokens])
        assert torch.equal(linear(x[most - tokens : most], packed), expected[most - tokens :])
    assert len(alike) <= 2 and alike["decode"] >= 32
    dense = reference_dequantize(packed)
    exact = x.double() @ dense.double().T
    assert error(whole, exact) <= 1.02 * error(torch.nn.functional.linear(x, dense), exact)
    assert torch.equal(linear(x, packed, weight=dense), whole)


@on_gpu
@by_format
def test_training_shapes_forward_and_gradient_equal_the_dense_linear(spec):
    packed = quantize(weight(1024, 768), spec)
    dense = reference_dequantize(packed)
    x = torch.randn(MOST + 88, 768, device=DEVICE, dtype=FLOAT, requires_grad=True)
    bias, dy = torch.randn(1024, device=DEVICE, dtype=FLOAT), torch.randn(MOST + 88, 1024, device=DEVICE, dtype=FLOAT)
    ours, theirs = linear(x, packed, bias), torch.nn.functional.linear(x, dense, bias)
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.autograd.grad(ours, x, dy)[0], torch.autograd.grad(theirs, x, dy)[0])


@on_gpu
def test_a_weight_beyond_the_scratch_is_cut_without_losing_accuracy_or_the_promise_about_residents(monkeypatch):
    from orbit_kernels.fast import dense as module

    monkeypatch.setattr(module, "SCRATCH_BYTES", 1 << 19)
    packed = quantize(weight(1024, 768), FORMATS["int4"])
    dense = reference_dequantize(packed)
    x = torch.randn(MOST + 88, 768, device=DEVICE, dtype=FLOAT, requires_grad=True)
    dy = torch.randn(MOST + 88, 1024, device=DEVICE, dtype=FLOAT)
    y, kept = linear(x, packed), linear(x, packed, weight=dense)
    (dx,), (dx_kept,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(kept, x, dy)
    assert torch.equal(y, kept) and torch.equal(dx, dx_kept)
    for ours, exact, theirs in [
        (y, x.double() @ dense.double().T, x @ dense.T),
        (dx, dy.double() @ dense.double(), dy @ dense),
    ]:
        assert error(ours, exact) <= 1.02 * error(theirs, exact)


@on_gpu
def test_rotation_by_the_front_door_is_deterministic_and_each_row_stands_alone():
    R = oft.cayley_neumann(torch.randn(80, 496, device=DEVICE) * 0.02, 32).to(FLOAT).requires_grad_()
    x = torch.randn(3, 1000, 2560, device=DEVICE, dtype=FLOAT, requires_grad=True)
    first, second = oft.rotate(x, R), oft.rotate(x, R)
    grads = [torch.autograd.grad(y, (x, R), torch.ones_like(y)) for y in (first, second)]
    assert torch.equal(first, second) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(oft.rotate(x[1, 7], R), first[1, 7])


@on_gpu
@by_format
def test_decode_is_safe_to_capture_and_replay(spec):
    """A chain, so that each product overlaps the end of the one that makes its input."""
    up, down = (quantize(weight(*shape), spec) for shape in ((5120, 2048), (2048, 5120)))
    x = torch.randn(4, 2048, device=DEVICE, dtype=FLOAT)

    def chain() -> torch.Tensor:
        h = x
        for _ in range(4):
            h = linear(linear(h, up), down)
        return h

    chain()  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(3):
        x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        h = x
        for step in range(8):
            h = linear(h, (up, down)[step % 2])
            torch.cuda.synchronize()
        assert torch.equal(y, h)


@on_gpu
def test_a_weight_written_just_before_is_the_one_multiplied():
    """The kernel may start before the one ahead of it ends, and still reads what that one has written."""
    weights = [quantize(weight(4096, 2560), FORMATS["int4"]) for _ in range(2)]
    live = replace(weights[0], tensors={key: tensor.clone() for key, tensor in weights[0].tensors.items()})
    x = torch.randn(4, 2560, device=DEVICE, dtype=FLOAT)
    expected = [linear(x, packed) for packed in weights]
    for turn_number in range(20):
        source = weights[turn_number % 2]
        for key in ("weight_scale", "weight_packed"):
            live.tensors[key].copy_(source.tensors[key])
        assert torch.equal(linear(x, live), expected[turn_number % 2])
