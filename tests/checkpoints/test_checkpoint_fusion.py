"""Fusing q/k/v and gate/up is a permutation of rows, whatever the sizes; FP8 scales follow their rows exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orbit_core.checkpoints.fusion import Fusion, collapse, grid_of, interleave, refine
from orbit_core.errors import InputError

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))  # query groups, heads per group, head_dim


def _qkv(groups: int, per_group: int, head_dim: int) -> tuple[int, int, int]:
    return groups * per_group * head_dim, groups * head_dim, groups * head_dim


@given(SIZES)
def test_interleaving_qkv_is_a_bijection_of_rows(sizes: tuple[int, int, int]) -> None:
    rows = _qkv(*sizes)
    numbers = torch.arange(sum(rows)).split(list(rows))
    fusion = Fusion("rows", sizes[0], rows)
    fused = fusion.fuse(numbers)
    assert fused.sort().values.tolist() == list(range(sum(rows)))
    assert all(torch.equal(part, back) for part, back in zip(numbers, fusion.split(fused, 3), strict=True))


@given(SIZES)
def test_each_query_group_lies_together_queries_then_key_then_value(sizes: tuple[int, int, int]) -> None:
    groups, per_group, head_dim = sizes
    rows = _qkv(*sizes)
    labels = [
        torch.tensor([f(row // head_dim) for row in range(count)])
        for f, count in zip((lambda h: h, lambda h: 1000 + h, lambda h: 2000 + h), rows, strict=True)
    ]
    heads = interleave(labels, groups).reshape(-1, head_dim)
    expected = [
        head
        for group in range(groups)
        for head in [*range(group * per_group, (group + 1) * per_group), 1000 + group, 2000 + group]
    ]
    assert heads[:, 0].tolist() == expected and (heads == heads[:, :1]).all()


def test_gate_rows_come_before_up_rows() -> None:
    fused = Fusion("rows", 1, (3, 3)).fuse([torch.zeros(3, 2), torch.ones(3, 2)])
    assert fused[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 8, 32, 48, 80, 96, 128, 130, 192, 256]), st.data())
def test_fused_block_scales_stand_over_the_rows_they_stood_over(
    groups: int, per_group: int, head_dim: int, data: st.DataObject
) -> None:
    rows, block = _qkv(groups, per_group, head_dim), 128
    grid = grid_of(rows, groups, block)
    assert block % grid == 0 and head_dim % grid == 0 and (head_dim % 128 or grid == 128)
    seed = data.draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.randn(-(-count // block), 2, generator=generator) for count in rows]
    fusion = Fusion("blocks", groups, rows, block, grid)
    fused = fusion.fuse(scales)
    per_row = [scale.repeat_interleave(block, 0)[:count] for scale, count in zip(scales, rows, strict=True)]
    assert torch.equal(fused.repeat_interleave(grid, 0), interleave(per_row, groups))
    assert fusion.fused_shape([tuple(scale.shape) for scale in scales]) == tuple(fused.shape)
    assert fusion.part_shapes(tuple(fused.shape), 3) == [tuple(scale.shape) for scale in scales]
    assert all(torch.equal(a, b) for a, b in zip(scales, fusion.split(fused, 3), strict=True))


def test_a_refined_grid_that_was_tampered_with_does_not_collapse() -> None:
    fine = refine(torch.tensor([[1.0], [2.0]]), rows=192, block=128, grid=64)
    assert fine[:, 0].tolist() == [1, 1, 2]
    fine[1] = torch.nextafter(fine[1], torch.tensor(9.0))
    with pytest.raises(InputError, match="equal scales"):
        collapse(fine, rows=192, block=128, grid=64)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16, torch.float32, torch.int64]
)
def test_bits_that_are_no_numbers_move_unharmed(dtype: torch.dtype) -> None:
    parts = [torch.full((4, 3 * dtype.itemsize), value, dtype=torch.uint8).view(dtype) for value in (255, 127)]
    fusion = Fusion("rows", 2, (4, 4))
    for part, back in zip(parts, fusion.split(fusion.fuse(parts), 2), strict=True):
        assert torch.equal(part.view(torch.uint8), back.view(torch.uint8)) and back.dtype == dtype


def test_per_tensor_values_are_stacked_not_mixed() -> None:
    fusion = Fusion("stack")
    fused = fusion.fuse([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])])
    assert fused.shape == (3, 1) and [part.item() for part in fusion.split(fused, 3)] == [1, 2, 3]
