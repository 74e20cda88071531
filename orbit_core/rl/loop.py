"""The RL loop. Step t is a function of (seed, t) and of the trainer's state after step t - 1:

    rollout    prompts f(seed, t), sampled under the keys (seed, t, group, sample)
    score      the trainer's own log-probs of what was sampled, adapter on and (for KL) off
    reward     judged, shaped, filtered, turned into advantages
    update     `updates_per_step` optimiser updates
    publish    the new adapter to all rollout engines, two-phase
    commit     rows, trainer state and metrics become visible together

So a run that is killed at any instant repeats at most the step in flight, and on deterministic engines repeats it bit
for bit. Adapter version v is the adapter after v steps; version 0 is the one that the run starts from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from orbit_core.errors import InputError, Interrupted, OrbitError
from orbit_core.recipe import Algorithm
from orbit_core.rl.filters import prompts_to_draw
from orbit_core.rl.generation import generate, requests_of_step
from orbit_core.rl.publication import Publisher
from orbit_core.rl.recorder import Recorder, StepResult
from orbit_core.rl.rewards import Judge
from orbit_core.rl.rows import sample_metrics
from orbit_core.rl.schedule import prompts_of_step
from orbit_core.rl.shaping import set_advantages, set_rewards, subtract_kl
from orbit_core.rl.types import Prompt, Sample
from orbit_core.rollout.base import RolloutEngine
from orbit_core.store.rollouts import Commit
from orbit_core.trainers.base import Trainer

Encode = Callable[[Prompt], Sequence[int]]
Decode = Callable[[Sequence[int]], str]
Progress = Callable[[Commit], None]


class Loop:
    """One run: everything that its steps need, and where it stands."""

    def __init__(
        self,
        trainer: Trainer,
        engines: Sequence[RolloutEngine],
        prompts: Sequence[Prompt],
        encode: Encode,
        decode: Decode,
        judge: Judge,
        algorithm: Algorithm,
        seed: int,
        recorder: Recorder,
    ) -> None:
        if not prompts:
            raise InputError("training prompts", "at least one", "none", "check the data step")
        self.trainer, self.engines, self.publisher = trainer, list(engines), Publisher(engines)
        self.prompts, self.encode, self.decode, self.judge = prompts, encode, decode, judge
        self.algorithm, self.seed, self.recorder = algorithm, seed, recorder
        self._digest = ""  # of the active adapter
        self._commit_seconds = 0.0

    def run(self, should_stop: Callable[[], bool] = lambda: False, progress: Progress = lambda commit: None) -> Commit:
        """Run, or go on, to the last step; returns its commit.

        Raises Interrupted when `should_stop()` turned true, after the step in flight is committed.
        """
        commit = self._resume()
        for step in range(0 if commit is None else commit.step + 1, self.algorithm.steps):
            if should_stop():
                raise Interrupted(
                    f"stopped on request with {step} of {self.algorithm.steps} steps done; start again to go on"
                )
            commit = self._step(step, commit)
            progress(commit)
        if commit is None:
            raise OrbitError("a run of no steps has no result")
        return commit

    def _resume(self) -> Commit | None:
        """Trainer and engines as they were after the last committed step (or as the run starts)."""
        commit = self.recorder.last()
        if commit is not None:
            self.trainer.load_state(self.recorder.load_state(commit))
            self.recorder.clean(commit.step)
            self.recorder.repeat_commits(commit.step)
        version = 0 if commit is None else commit.adapter_version
        self._digest = self.publisher.publish(version, self.trainer.export_adapter())
        if commit is not None and self._digest != commit.adapter_digest:
            raise OrbitError(
                f"run {commit.run} resumed after step {commit.step}\n  expected: adapter {commit.adapter_digest}\n"
                f"  found: adapter {self._digest} from the committed state\n"
                "  what to do: use the same versions of Orbit and torch that the run was started with"
            )
        return commit

    def _step(self, step: int, previous: Commit | None) -> Commit:
        clock = Clock()
        with clock.phase("rollout"):
            samples = self._sample(step)
        with clock.phase("score"):
            self._score(samples)
        with clock.phase("reward"):
            trained = self._reward(samples, step)
        metrics = sample_metrics(samples, version=step)
        with clock.phase("update"):
            metrics = self._update(trained, step) | metrics
        require_finite(metrics, step)
        sampled_with = self._digest
        with clock.phase("publish"):
            self._digest = self.publisher.publish(step + 1, self.trainer.export_adapter())
        start = time.perf_counter()
        result = StepResult(
            step=step,
            samples=samples,
            # A commit cannot hold its own duration: `seconds_commit` is that of the commit before.
            metrics={**metrics, **clock.seconds, "seconds_commit": self._commit_seconds},
            state=self.trainer.state(),
            adapter_version=step + 1,
            adapter_digest=self._digest,
            sampled_with=sampled_with,
            rollout_seconds=clock.seconds["seconds_rollout"],
        )
        commit = self.recorder.commit(result, previous)
        self._commit_seconds = time.perf_counter() - start
        return commit

    def _sample(self, step: int) -> list[Sample]:
        algorithm = self.algorithm
        rows = prompts_of_step(self.seed, step, len(self.prompts), prompts_to_draw(algorithm))
        prompts = [self.prompts[row] for row in rows]
        encoded = [tuple(self.encode(prompt)) for prompt in prompts]
        requests = requests_of_step(encoded, algorithm.samples_per_prompt, self.seed, step)
        completions = generate(self.engines, requests, algorithm.sampling)
        return [
            Sample(
                prompt=prompts[request.key.group],
                key=request.key,
                prompt_ids=request.prompt_ids,
                completion=completion,
                text=self.decode(completion.token_ids),
            )
            for request, completion in zip(requests, completions, strict=True)
        ]

    def _score(self, samples: Sequence[Sample]) -> None:
        temperature = self.algorithm.sampling.temperature
        sequences = [(sample.prompt_ids, sample.completion.token_ids) for sample in samples]
        for sample, logprobs in zip(samples, self.trainer.score(sequences, temperature), strict=True):
            sample.trainer_logprobs = tuple(logprobs.tolist())
        # Without a penalty one sample a group is enough to show how far the policy has gone from the base.
        penalised = self.algorithm.kl.coefficient > 0
        referenced = [sample for sample in samples if penalised or sample.key.sample == 0]
        sequences = [(sample.prompt_ids, sample.completion.token_ids) for sample in referenced]
        for sample, logprobs in zip(referenced, self.trainer.score(sequences, temperature, adapter=False), strict=True):
            sample.reference_logprobs = tuple(logprobs.tolist())

    def _reward(self, samples: Sequence[Sample], step: int) -> list[Sample]:
        """Judge, shape and filter; returns the samples to train on."""
        verdicts = self.judge.judge([(sample.prompt, sample.text) for sample in samples])
        shuffle = (self.seed, step) if self.judge.settings.shuffle else None
        set_rewards(samples, verdicts, self.algorithm, shuffle)
        if self.algorithm.kl.coefficient > 0 and self.algorithm.kl.place == "reward":
            subtract_kl(samples, self.algorithm)
        return set_advantages(samples, self.algorithm)

    def _update(self, trained: Sequence[Sample], step: int) -> dict[str, float]:
        """Metrics of the last of the updates. Without a sample to train on the trainer is asked once, moves nothing and
        reports what it can, so that every step has the same metrics.
        """
        updates = self.algorithm.updates_per_step if trained else 0
        metrics: dict[str, float] = {}
        for _ in range(max(1, updates)):
            metrics = self.trainer.update(trained, self.algorithm, step)
        return {**metrics, "updates": float(updates)}


class Clock:
    """Wall-clock seconds by phase, as metrics."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"seconds_{name}"] = time.perf_counter() - start


def require_finite(metrics: dict[str, float], step: int) -> None:
    """Before a diverged step is committed: no run goes on from NaN."""
    wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        raise InputError(
            f"step {step}",
            "finite metrics",
            f"{wrong}",
            "lower algorithm.optimizer.learning_rate; the step is not committed",
        )
