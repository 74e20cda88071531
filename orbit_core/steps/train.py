"""train: the RL loop on the frozen base, committed step by step to the store; the output is the last step's adapter.

The run's id is the beginning of this step's digest, so that a second try of the same spec, on whatever machine, finds
the commits of the first and goes on. Rollouts and trainer state are in the store, not in the artifact:

    adapter/        PEFT directory
    metrics.jsonl   one row per step
    summary.json    the facts
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter
from torch import Tensor

from orbit_core.adapters.peft_io import load_adapter, save_adapter
from orbit_core.data.encode import encode_prompt, load_tokenizer
from orbit_core.data.prompts import read_prompts
from orbit_core.errors import OrbitError
from orbit_core.recipe import Adapter, Algorithm, Engines, Reward, Section
from orbit_core.rl.loop import Loop
from orbit_core.rl.recorder import Recorder
from orbit_core.rl.rewards import Judge
from orbit_core.rollout import load_rollout_engine
from orbit_core.steps.contract import StepContext
from orbit_core.store import open_store
from orbit_core.store.rollouts import Commit
from orbit_core.trainers import load_trainer


class Params(Section):
    adapter: Adapter
    algorithm: Algorithm
    reward: Reward
    engines: Engines
    seed: int = Field(ge=0)


def run(context: StepContext) -> dict[str, Any]:
    params = TypeAdapter(Params).validate_python(context.spec.params)
    run_id = context.spec.digest[:16]
    loop = _make_loop(context, params, run_id)
    total = params.algorithm.steps
    context.progress(0, total, f"run {run_id}: {len(loop.prompts)} prompts")
    last = loop.run(context.should_stop, lambda commit: _report(context, commit, total))

    tensors, base = loop.trainer.export_adapter(), context.spec.inputs["quantized"].digest
    written = save_adapter(context.output / "adapter", tensors, params.adapter, base_digest=base)
    if written != last.adapter_digest:
        raise OrbitError(f"adapter of run {run_id}: expected digest {last.adapter_digest}, found {written} as written")
    facts = summarise(_written(context.output / "metrics.jsonl", loop.recorder.reader.commits()), last)
    (context.output / "summary.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return facts


def _make_loop(context: StepContext, params: Params, run_id: str) -> Loop:
    quantized, converted = context.inputs["quantized"], context.inputs["converted"]
    prompts = read_prompts(context.inputs["data"] / "train.parquet")
    tokenizer = load_tokenizer(quantized)
    judge = Judge(params.reward)  # before the engines: a reward that cannot be made should not cost their start
    trainer = load_trainer(params.engines, converted, quantized, params.adapter, params.seed)
    if "warm_start" in context.inputs:
        trainer.load_adapter(_warm_start(context, params.adapter))
    return Loop(
        trainer,
        [load_rollout_engine(params.engines, quantized, params.adapter)],
        prompts,
        encode=lambda prompt: encode_prompt(prompt, tokenizer),
        decode=tokenizer.decode,
        judge=judge,
        algorithm=params.algorithm,
        seed=params.seed,
        recorder=Recorder(
            open_store(context.spec.store), run_id, context.spec.inputs["quantized"].digest, context.fence
        ),
    )


def _warm_start(context: StepContext, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter to start from: a person's own directory, which must be of this base, or that of an earlier run,
    which whoever planned it has looked at (a new base is then asked for in words)."""
    given = context.inputs["warm_start"]
    if context.spec.inputs["warm_start"].step:
        return load_adapter(given / "adapter", adapter)
    return load_adapter(given, adapter, context.spec.inputs["quantized"].digest)


def _report(context: StepContext, commit: Commit, total: int) -> None:
    metrics = commit.metrics
    message = f"reward {metrics['reward_mean']:.3f}, accuracy {metrics['accuracy']:.3f}"
    context.progress(commit.step + 1, total, message, reward=metrics["reward_mean"], accuracy=metrics["accuracy"])


def _written(path: Path, commits: Iterable[Commit]) -> Iterator[Commit]:
    """The commits as they come, each with its row written."""
    with path.open("w", encoding="utf-8") as file:
        for commit in commits:
            file.write(json.dumps({"step": commit.step, **commit.metrics}, sort_keys=True) + "\n")
            yield commit


def summarise(commits: Iterable[Commit], last: Commit) -> dict[str, Any]:
    """The facts of a run, from the commits of all its steps, of which one at a time is held: there may be ten thousand.
    The mean gap is over tokens, not over steps."""
    first: Commit | None = None
    steps = rows = 0
    sums: dict[str, float] = {}
    highest: dict[str, float] = {}
    gaps = 0.0
    for commit in commits:
        first, steps, rows = first or commit, steps + 1, rows + commit.rows
        gaps += commit.metrics["scored_tokens"] * commit.metrics["logprob_gap_mean"]
        for name, value in commit.metrics.items():
            sums[name] = sums.get(name, 0.0) + value
            highest[name] = max(value, highest.get(name, value))
    assert first is not None, "a run has a step"
    return {
        "run": last.run,
        "steps": steps,
        "rows": rows,
        "rows_trained": int(sums["rows_trained"]),
        "reward_first": first.metrics["reward_mean"],
        "reward_last": last.metrics["reward_mean"],
        "accuracy_first": first.metrics["accuracy"],
        "accuracy_last": last.metrics["accuracy"],
        "logprob_gap_mean": gaps / max(1.0, sums["scored_tokens"]),
        "logprob_gap_max": highest["logprob_gap_max"],
        "max_orthogonality_error": highest.get("max_orthogonality_error"),
        "adapter_digest": last.adapter_digest,
        "adapter_version": last.adapter_version,
        "seconds": {
            name.removeprefix("seconds_"): round(total, 3)
            for name, total in sorted(sums.items())
            if name.startswith("seconds_")
        },
    }
