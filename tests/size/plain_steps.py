"""Committed steps without recorder and torch: rows whose every value follows from run, step and place."""

from __future__ import annotations

from typing import Any

from orbit_core.store.base import Store
from orbit_core.store.commits import Commit, StateFile, rollouts_path
from orbit_core.store.rollouts import SCHEMA, encode_step


def columns_of(run: str, step: int, rows: int) -> dict[str, list[Any]]:
    numbers = range(rows)
    columns: dict[str, list[Any]] = {field.name: [None] * rows for field in SCHEMA}
    return columns | {
        "run_id": [run] * rows,
        "step_index": [step] * rows,
        "group_index": [n // 2 for n in numbers],
        "sample_index": [n % 2 for n in numbers],
        "prompt": [f"say {n // 2}" for n in numbers],
        "label": [str(n) for n in numbers],
        "response": [f"{step} {n}" for n in numbers],
        "advantage": [0.0] * rows,
        "finish_reason": ["stop"] * rows,
        "response_token_ids": [[step, n] for n in numbers],
        "rollout_logprobs": [[-0.5] * (n % 3) for n in numbers],
        "reward": [step + n / 8 for n in numbers],
        "reward_parts": [[{"name": "score", "value": float(n)}] for n in numbers],
    }


def commit_step(store: Store, run: str, step: int, rows: int = 2) -> None:
    commit = Commit(
        run=run,
        step=step,
        rows=rows,
        state=StateFile(path="s", sha256="0" * 64),
        adapter_version=step + 1,
        adapter_digest=f"{step:064d}",
        metrics={"reward_mean": float(step)},
        previous=None,
    )
    assert store.put_if_absent(rollouts_path(run, step), encode_step(columns_of(run, step, rows), commit))


def keys(run: str, steps: range, rows: int = 2) -> list[tuple[str, int, int, int]]:
    """What identifies each row of `steps`, in order."""
    return [(run, step, n // 2, n % 2) for step in steps for n in range(rows)]
