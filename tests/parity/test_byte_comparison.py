"""The byte side by itself: whatever differs is found, counted and located."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orbit_core.parity.bytes import compare_bytes, difference, siblings

DTYPES = [torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float8_e4m3fn]


@given(st.sampled_from(DTYPES), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6), st.integers(0, 7))
@settings(max_examples=100)
def test_any_single_bit_is_found_where_it_is(dtype: torch.dtype, rows: int, columns: int, place: int, bit: int) -> None:
    size = dtype.itemsize
    raw = torch.randint(
        0, 256, (rows, columns * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(place)
    )
    spoiled = raw.clone()
    spoiled.view(-1)[place % raw.numel()] ^= 1 << bit
    right, wrong = {"w": raw.view(dtype)}, {"w": spoiled.view(dtype)}
    entry = difference("w", right, wrong)
    assert entry["differing_elements"] == entry["differing_bits"] == 1
    assert entry["first_index"] == place % raw.numel() // size
    report = compare_bytes(right.items, {"trainer": wrong.items, "rollout": right.items})  # type: ignore[arg-type]
    assert not report["ok"] and report["engines"]["rollout"]["ok"]
    assert report["worst"]["name"] == "w"


def test_scalars_dtypes_and_shapes_are_compared_too() -> None:
    right = {"scale": torch.tensor(2.0), "codes": torch.zeros(2, 3, dtype=torch.uint8)}
    for wrong in (
        {**right, "scale": torch.tensor([2.0])},
        {**right, "codes": torch.zeros(3, 2, dtype=torch.uint8)},
        {**right, "codes": torch.zeros(2, 3, dtype=torch.int8)},
    ):
        report = compare_bytes(right.items, {"trainer": wrong.items})  # type: ignore[arg-type]
        assert "another dtype or shape" in report["worst"]["diagnosis"]


def test_a_nan_equals_itself_and_minus_zero_is_not_zero() -> None:
    right = {"a": torch.tensor([float("nan"), 0.0])}
    same, signed = {"a": torch.tensor([float("nan"), 0.0])}, {"a": torch.tensor([float("nan"), -0.0])}
    assert compare_bytes(right.items, {"trainer": same.items})["ok"]  # type: ignore[arg-type]
    assert not compare_bytes(right.items, {"trainer": signed.items})["ok"]  # type: ignore[arg-type]


def test_every_differing_tensor_is_named_also_beyond_those_examined() -> None:
    right = {f"t{i}": torch.zeros(2, 2) for i in range(30)}
    wrong = {name: tensor + 1 for name, tensor in right.items()}
    verdict = compare_bytes(right.items, {"trainer": wrong.items})["engines"]["trainer"]  # type: ignore[arg-type]
    assert [entry["name"] for entry in verdict["differing"]] == list(right)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("attn.k_proj.weight", ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"]),
        ("experts.3.up_proj.weight_scale", ["experts.3.gate_proj.weight_scale", "experts.3.up_proj.weight_scale"]),
        ("attn.o_proj.weight", ["attn.o_proj.weight"]),
    ],
)
def test_siblings_are_what_megatron_fuses(name: str, fused: list[str]) -> None:
    assert siblings(name) == fused
