"""The overhead of a tensor in `convert` does not grow with how many there are. Calls are counted, not timed."""

from __future__ import annotations

from pathlib import Path

import pytest
from measure_tensors import function_calls, tiny_model

from orbit_core.checkpoints.megatron import to_megatron


def test_each_further_tensor_costs_the_same(tmp_path: Path) -> None:
    to_megatron(tiny_model(tmp_path / "first", 6)[0], tmp_path / "imports")  # what is imported is not counted
    counts, calls = [], []
    for tensors in (300, 600, 1200):
        source, count = tiny_model(tmp_path / f"hf-{tensors}", tensors)
        counts.append(count)
        calls.append(function_calls(source, tmp_path / f"megatron-{tensors}"))
    early = (calls[1] - calls[0]) / (counts[1] - counts[0])
    late = (calls[2] - calls[1]) / (counts[2] - counts[1])
    assert late == pytest.approx(early, rel=0.05)
    assert late < 1000, "about 400, a third of a millisecond"
