"""Runs of any length, made through the real recorder: what is missing is the model, not the store's work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from orbit_core.rl.recorder import Recorder, StepResult
from orbit_core.rl.types import Completion, Prompt, Sample, SampleKey
from orbit_core.store.base import Store
from orbit_core.store.commits import Commit

METRICS = (  # what a real step leaves
    *("reward_mean", "accuracy", "reward_failed", "groups", "groups_kept", "rows_trained", "kl", "staleness_max"),
    *("response_length_mean", "response_length_max", "cut_off_fraction", "entropy", "scored_tokens"),
    *("logprob_gap_mean", "logprob_gap_max", "max_orthogonality_error", "loss", "grad_norm", "learning_rate"),
    *("ratio_mean", "clip_fraction", "updates", "seconds_rollout", "seconds_score", "seconds_reward"),
    *("seconds_update", "seconds_publish", "seconds_commit"),
)
RUN = "long"


def result_of(step: int, rows: int) -> StepResult:
    """A step of `rows` small samples in groups of two, all of whose values follow from its number."""
    samples = [
        Sample(
            prompt=Prompt(f"p{n // 2}", f"say {step}", str(n), {}),
            key=SampleKey(7, step, n // 2, n % 2),
            prompt_ids=(step % 1000, n),
            completion=Completion((n, step % 1000), (-0.5, -0.25), (step, step), "stop"),
            text=f"{n} {step}",
            trainer_logprobs=(-0.5, -0.25),
            reward=float((step + n) % 3),
            reward_parts={"score": 1.0},
        )
        for n in range(rows)
    ]
    metrics = {name: (step * 31 + n) % 1009 / 7 for n, name in enumerate(METRICS)}
    state = {"theta": torch.full((64,), float(step))}
    digest = f"{step:064d}"
    return StepResult(step, samples, metrics, state, step + 1, digest, digest, rollout_seconds=0.5)


def make_run(
    store: Store, steps: int, rows: int = 2, run: str = RUN, after: Callable[[int], None] = lambda step: None
) -> Commit | None:
    """Commit steps 0 to `steps` - 1, or go on to there; `after(step)` is called when a step is committed."""
    recorder = Recorder(store, run, base_digest="base")
    commit = recorder.last()
    for step in range(0 if commit is None else commit.step + 1, steps):
        commit = recorder.commit(result_of(step, rows), commit)
        after(step)
    return commit


@contextmanager
def no_fsync() -> Iterator[None]:
    """For runs that are made to be looked at: what a disk takes for its promises is measured elsewhere."""
    real, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = real
