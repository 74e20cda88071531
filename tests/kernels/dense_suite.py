"""What the dense packed product and the choice of ways promise; run by test_fast_paths.py as fast_suite.py is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fast_suite import DEVICE, FLOAT, error, on_gpu, replays_alike
from orbit_kernels import FormatSpec, PackedWeight, dequantize, linear
from orbit_kernels.fast.decode import MAX_TOKENS
from orbit_kernels.fast.dense_packed import dense_packed, supports
from orbit_kernels.fast.dispatch import MOST, choose, named, quickest
from orbit_kernels.fast.dispatch_table import TABLE
from orbit_kernels.fast.packed_launch import ROUND, Cut
from random_weights import FUSED, extremes, random_packed

CUTS = [Cut(128, 64, 64), Cut(128, 128, 64), Cut(128, 256, 128)]
WIDE = Cut(256, 128, 128)  # what products of several experts take
UNEVEN = [Cut(128, block, short, tail=3, pieces=7) for block, short in ((64, 64), (128, 64), (256, 128))]
TEAMS = [Cut(128, 64, 64, teams=2), Cut(128, 64, 64, 2, teams=2), Cut(128, 64, 64, teams=2, tail=3, pieces=7)]
by_format = pytest.mark.parametrize("spec", FUSED, ids=named)


def spec_of(name: str) -> FormatSpec:
    """As `named` writes it."""
    kind, group = name.split("-")
    return FormatSpec(kind, int(group))


def test_the_table_names_ways_that_its_weights_can_go():
    for (operation, name, out, width), entries in TABLE.items():
        packed = random_packed(spec_of(name), out, width, "meta")
        assert supports(packed)
        most = [rows for rows, _ in entries]
        assert most == sorted(set(most)) and most[-1] == 1 << 30
        made, length = (out, width) if operation == "forward" else (width, out)
        for rows, way in entries:
            if way == "decode":
                assert operation == "forward" and rows <= MAX_TOKENS
            elif way != "scratch":
                cut = Cut(*way)
                uncut, pieces = cut.shares(made // cut.outs)
                bands = -(-min(rows, 1 << 20) // cut.block)
                assert made % cut.outs == 0 and cut.short <= cut.block and uncut >= 0
                assert pieces <= (made // cut.outs - uncut) * length // 64
                assert not pieces or bands * (made // cut.outs - uncut) <= 4096  # counters of one launch


def test_a_weight_that_no_table_lists_is_decoded_then_cut_by_rule_then_goes_through_the_scratch():
    packed = random_packed(FormatSpec("int4", 32), 1024, 3072, "meta")
    assert [choose("forward", packed, rows) for rows in (0, 1, MAX_TOKENS)] == ["scratch", "decode", "decode"]
    assert choose("forward", packed, 100) == Cut(128, 64, 64, 8) and choose("dX", packed, 64) == Cut(128, 64, 64, 4)
    assert choose("forward", packed, MOST + 1) == choose("dX", packed, MOST + 1) == "scratch"


def test_the_rule_finds_nearly_the_best_that_measuring_found():
    results = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "results"
    longer = []
    for name in ("dense_int4", "dense_int4_32", "dense_fp8", "dense_formats"):
        for row in json.loads((results / f"{name}.json").read_text())["rows"]:
            if row["M"] <= MOST:
                made, length = (row["out"], row["in"]) if row["op"] == "forward" else (row["in"], row["out"])
                microseconds = {Cut(*way): us for us, *way in row["ways"]}
                best = min(row["scratch_us"], *microseconds.values())
                longer.append(microseconds[quickest(made, length, row["M"])] / best)
    assert max(longer) <= 1.15 and sum(longer) / len(longer) <= 1.02


@pytest.mark.parametrize("rows", [1, 64, 65, 200, 512])
def test_the_rule_cuts_any_weight_into_what_can_run(rows):
    for made in (128, 384, 1024, 5120, 18944, 151936):
        for length in (128, 640, 4096, 25600):
            cut = quickest(made, length, rows)
            uncut, pieces = cut.shares(made // cut.outs)
            bands = -(-rows // cut.block)
            assert uncut >= 0 and pieces * bands <= ROUND and pieces * 256 <= (made // cut.outs - uncut) * length


@on_gpu
@by_format
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
def test_products_with_unit_vectors_give_the_bits_of_the_dequantised_weight(spec, turned):
    x = torch.eye(512 if turned else 768, device=DEVICE, dtype=FLOAT)
    for packed in extremes(random_packed(spec, 512, 768, DEVICE)):
        dense = dequantize(packed)
        for cut in [*CUTS, WIDE, *UNEVEN, *TEAMS]:
            found = dense_packed(x, packed, turned, cut)
            assert torch.equal(found, dense if turned else dense.T)


def rows_keep_their_bits(packed: PackedWeight, x: torch.Tensor, turned: bool, cuts: list[Cut]) -> None:
    """Every cut gives a row of x the bits that the first gives it, in any company, and is as exact as cuBLAS."""
    weight = dequantize(packed) if turned else dequantize(packed).T
    exact = x.double() @ weight.double()
    first = dense_packed(x, packed, turned, cuts[0])
    assert error(first, exact) <= 1.02 * error(x @ weight, exact)
    for cut in cuts:
        for rows in (301, 200, 64, 1):
            assert torch.equal(dense_packed(x[:rows].contiguous(), packed, turned, cut), first[:rows])
        assert torch.equal(dense_packed(x[100:].contiguous(), packed, turned, cut), first[100:])


@on_gpu
@by_format
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_row_has_the_same_bits_for_every_cut_with_as_many_parts_and_in_every_run(spec, turned, parts):
    packed = random_packed(spec, 512, 1280, DEVICE)
    x = torch.randn(301, 512 if turned else 1280, device=DEVICE).to(FLOAT)
    cuts = [replace(cut, parts=parts) for cut in [*CUTS, *([WIDE] if parts < 3 else [])]]
    rows_keep_their_bits(packed, x, turned, cuts)
    if not turned:
        dense, bias = dequantize(packed), torch.randn(512, device=DEVICE, dtype=FLOAT)
        exact = x.double() @ dense.double().T + bias.double()
        found = dense_packed(x, packed, turned, cuts[1], bias)
        assert error(found, exact) <= 1.02 * error(x @ dense.T + bias, exact)


@on_gpu
@by_format
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("cuts", [UNEVEN, *([cut] for cut in TEAMS)], ids=["uneven", "teams", "parts", "both"])
def test_a_row_has_the_same_bits_in_any_company_wherever_sums_are_cut(spec, turned, cuts):
    packed = random_packed(spec, 640, 1280, DEVICE)
    rows_keep_their_bits(packed, torch.randn(301, 640 if turned else 1280, device=DEVICE).to(FLOAT), turned, cuts)


@on_gpu
@by_format
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
def test_pieces_that_cannot_run_at_a_time_do_not_wait_for_each_other(spec, turned, monkeypatch):
    packed = random_packed(spec, 640, 1280, DEVICE)
    x = torch.randn(301, 640 if turned else 1280, device=DEVICE).to(FLOAT)
    cuts = [Cut(128, 64, 64, 3), Cut(128, 256, 128, 4), Cut(128, 128, 64, tail=3, pieces=7)]
    expected = [dense_packed(x, packed, turned, cut) for cut in cuts]
    for programs in (1, 3, 7):
        monkeypatch.setattr("orbit_kernels.fast.packed_launch.multiprocessors", lambda _, programs=programs: programs)
        for cut, same in zip(cuts, expected, strict=True):
            assert torch.equal(dense_packed(x, packed, turned, cut), same)


@on_gpu
@by_format
def test_a_product_that_starts_early_reads_what_the_kernels_ahead_of_it_have_written(spec):
    weights = [random_packed(spec, 1280, 1280, DEVICE) for _ in range(3)]
    there = random_packed(spec, 1280, 1280, DEVICE)
    x = torch.randn(100, 1280, device=DEVICE).to(FLOAT)
    cut = Cut(128, 64, 64, 2, teams=2)

    def chain() -> torch.Tensor:
        y = x
        for weight in weights:
            for name, tensor in there.tensors.items():
                tensor.copy_(weight.tensors[name])
            y = dense_packed(dense_packed(y, there, False, cut), there, True, Cut(128, 64, 64))
        return y

    replays_alike(chain, chain())


@on_gpu
@by_format
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "gradient"])
def test_a_captured_product_writes_every_element_at_every_replay(spec, turned):
    packed = random_packed(spec, 512, 1280, DEVICE)
    x = torch.randn(100, 512 if turned else 1280, device=DEVICE).to(FLOAT)
    for cut in (Cut(128, 64, 64, 2), UNEVEN[0], TEAMS[2]):
        dense_packed(x, packed, turned, cut)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = dense_packed(x, packed, turned, cut)
        for _ in range(2):
            x.normal_()
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, dense_packed(x, packed, turned, cut))


@on_gpu
def test_by_the_front_door_every_way_of_the_table_is_the_linear_layer_and_its_gradient():
    for (operation, name, out, width), entries in TABLE.items():
        if (out, width) != (4096, 2560) or operation != "forward":
            continue
        packed = random_packed(spec_of(name), out, width, DEVICE)
        dense = dequantize(packed)
        for rows in sorted({min(most, 3000) for most, _ in entries} | {65, 100, 2048}):
            x = torch.randn(rows, width, device=DEVICE, dtype=FLOAT, requires_grad=True)
            dy = torch.randn(rows, out, device=DEVICE, dtype=FLOAT)
            y = linear(x, packed)
            (dx,) = torch.autograd.grad(y, x, dy)
            exact, exact_dx = x.double() @ dense.double().T, dy.double() @ dense.double()
            assert error(y, exact) <= 1.02 * error(x @ dense.T, exact)
            assert error(dx, exact_dx) <= 1.02 * error(dy @ dense, exact_dx)
            assert torch.equal(y, linear(x, packed, weight=dense)) and torch.equal(y, linear(x, packed))
