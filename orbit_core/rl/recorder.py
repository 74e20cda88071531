"""One write makes a step visible: its Parquet file, put last and only if absent, is its commit.

    1. state    runs/<run>/state/step-<000012>-<sha16>.safetensors    everything the next update depends on
    2. commit   rollouts/run=<run>/step=<000012>/rollouts.parquet     rows; the footer names the state and its sha256
    3. clean    states older than the last two are deleted
    4. block    runs/<run>/commits/<from>-<to>.jsonl                  after every 100th step: its commits once more

Killed before 2, the step never happened: the state is a file that nothing names, and as a repeated step makes the same
bytes it is written again under the same name, or removed by a later step's clean. Killed after 2, the step is done, and
what is left of 3 and 4 is done by whoever resumes the run. Neither a commit nor a resumption looks at more of the past
than two states and one block: both cost the same at step 10 and at step 10,000.
When two runners race, the first commit stands; the second adopts it if it reached the same state, and stops if not.
Where a lease keeps them apart, `fence` is asked right before 2 and raises in the one that has lost it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from orbit_core.errors import OrbitError
from orbit_core.rl.rows import columns_of
from orbit_core.rl.types import Sample
from orbit_core.store.base import Store
from orbit_core.store.commits import (
    KEEP_STATES,
    Commit,
    StateFile,
    block_path,
    encode_block,
    last_whole_block,
    rollouts_path,
    states_prefix,
    step_of_state,
)
from orbit_core.store.rollouts import RolloutReader, encode_step


@dataclass(frozen=True)
class StepResult:
    """What the loop hands over at the end of a step."""

    step: int
    samples: Sequence[Sample]
    metrics: dict[str, float]
    state: dict[str, torch.Tensor]
    adapter_version: int  # after the step
    adapter_digest: str
    sampled_with: str  # digest of the adapter before the step
    rollout_seconds: float


class Recorder:
    """Commits steps of one run and finds the last one again."""

    def __init__(self, store: Store, run: str, base_digest: str, fence: Callable[[], None] = lambda: None) -> None:
        self.store, self.run, self.base_digest, self.fence = store, run, base_digest, fence
        self.reader = RolloutReader(store, run)
        self._recent: list[Commit] = []  # the last ones, of the block that is being filled

    def last(self) -> Commit | None:
        step = self.reader.last_step()
        return None if step is None else self.reader.commit(step)

    def load_state(self, commit: Commit) -> dict[str, torch.Tensor]:
        """The trainer's state after the committed step. Raises OrbitError when its bytes are not those committed."""
        try:
            content = self.store.read(commit.state.path)
        except FileNotFoundError:
            raise OrbitError(
                f"state of run {self.run} after step {commit.step}\n  expected: {commit.state.path}\n"
                "  found: no such file\n  what to do: start again if another process is training the same run; "
                "otherwise restore the file"
            ) from None
        found = hashlib.sha256(content).hexdigest()
        if found != commit.state.sha256:
            raise OrbitError(
                f"state of run {self.run} after step {commit.step}: {commit.state.path}\n"
                f"  expected: sha256 {commit.state.sha256}\n  found: sha256 {found}\n"
                "  what to do: restore the file; its bytes have changed since they were committed"
            )
        return load_safetensors(content)

    def commit(self, result: StepResult, previous: Commit | None) -> Commit:
        """Make the step visible; returns the commit that stands (another runner's, if it got there first)."""
        content = save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in result.state.items()})
        sha256 = hashlib.sha256(content).hexdigest()
        state = StateFile(path=f"{states_prefix(self.run)}{result.step:06d}-{sha256[:16]}.safetensors", sha256=sha256)
        commit = Commit(
            run=self.run,
            step=result.step,
            rows=len(result.samples),
            state=state,
            adapter_version=result.adapter_version,
            adapter_digest=result.adapter_digest,
            metrics=result.metrics,
            previous=previous.digest if previous else None,
        )
        columns = columns_of(result.samples, self.run, self.base_digest, result.sampled_with, result.rollout_seconds)
        file = encode_step(columns, commit)
        self.store.put(state.path, content)  # over what a dead try has left: whole again, and not old in the eyes of gc
        self.fence()
        if not self.store.put_if_absent(rollouts_path(self.run, result.step), file):
            commit = self._adopt(commit)
        self._recent.append(commit)
        self.clean(result.step)
        if last_whole_block(result.step + 1) != last_whole_block(result.step):
            self.repeat_commits(result.step)
        return commit

    def _adopt(self, ours: Commit) -> Commit:
        theirs = self.reader.commit(ours.step)
        if theirs.state.sha256 != ours.state.sha256:
            raise OrbitError(
                f"run {self.run}, step {ours.step}: already committed with another result\n"
                f"  expected: state {ours.state.path}\n  found: state {theirs.state.path}\n"
                "  what to do: stop the other process that trains this run; start again to go on from its commit"
            )
        return theirs

    def clean(self, step: int) -> None:
        """Delete states older than the last KEEP_STATES; `step` is committed."""
        for path in self.store.list(states_prefix(self.run)):
            saved = step_of_state(path)
            if saved is not None and saved <= step - KEEP_STATES:
                self.store.delete(path)

    def repeat_commits(self, step: int) -> None:
        """Put the last whole block's commits into one file, unless it is there; `step` is the last one committed."""
        block, recent = last_whole_block(step + 1), self._recent
        self._recent = []
        if block is None or self.store.exists(block_path(self.run, block)):
            return
        older = self.reader.commits(range(block.start, block.stop - len(recent)))  # before this process went on
        self.store.put_if_absent(block_path(self.run, block), encode_block([*older, *recent]))
