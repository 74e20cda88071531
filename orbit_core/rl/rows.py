"""Samples as columns of the rollout table, and the numbers that a step is summed up in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from orbit_core.rl.kl import kl_per_token
from orbit_core.rl.types import Sample


def columns_of(
    samples: Sequence[Sample], run: str, base_digest: str, adapter_digest: str, rollout_seconds: float
) -> dict[str, list[Any]]:
    """The samples as columns of `store.rollouts.SCHEMA`, in their order."""
    count = len(samples)
    return {
        "run_id": [run] * count,
        "step_index": [sample.key.step for sample in samples],
        "group_index": [sample.key.group for sample in samples],
        "sample_index": [sample.key.sample for sample in samples],
        "prompt_id": [sample.prompt.id for sample in samples],
        "prompt": [_text(sample.prompt.messages) for sample in samples],
        "label": [_json(sample.prompt.label) for sample in samples],
        "prompt_token_ids": [sample.prompt_ids for sample in samples],
        "response": [sample.text for sample in samples],
        "response_token_ids": [sample.completion.token_ids for sample in samples],
        "rollout_logprobs": [sample.completion.logprobs for sample in samples],
        "trainer_logprobs": [sample.trainer_logprobs for sample in samples],
        "reference_logprobs": [sample.reference_logprobs for sample in samples],
        "adapter_versions": [sample.completion.versions for sample in samples],
        "reward": [sample.reward for sample in samples],
        "reward_parts": [_pairs(sample.reward_parts) for sample in samples],
        "advantage": [sample.advantage for sample in samples],
        "trained": [sample.trained for sample in samples],
        "finish_reason": [sample.completion.finish_reason for sample in samples],
        "base_digest": [base_digest] * count,
        "adapter_digest": [adapter_digest] * count,
        "seed": [sample.key.seed for sample in samples],
        "rollout_seconds": [rollout_seconds] * count,
        "reward_seconds": [sample.reward_seconds for sample in samples],
    }


def sample_metrics(samples: Sequence[Sample], version: int) -> dict[str, float]:
    """What the samples of a step say before the update; `version` is the adapter's before the step.

    Log-prob gap: |trainer - rollout| over all tokens that the trainer has scored. Entropy: minus the mean log-prob of
    the sampled tokens, its unbiased estimate at the sampling temperature. KL: k3 to the adapter-off reference, mean
    over the tokens that were scored with the adapter off.
    """
    lengths = np.array([len(sample.completion.token_ids) for sample in samples])
    rollout = np.concatenate([np.asarray(sample.completion.logprobs, dtype=np.float64) for sample in samples])
    scored = [sample for sample in samples if sample.trainer_logprobs]
    pairs = [(sample.trainer_logprobs, sample.completion.logprobs) for sample in scored]
    gap = np.concatenate([np.abs(np.subtract(ours, theirs)) for ours, theirs in pairs]) if pairs else np.zeros(0)
    kept = {sample.key.group for sample in samples if sample.trained}
    oldest = min((min(sample.completion.versions, default=version) for sample in samples), default=version)
    return {
        "reward_mean": _mean([sample.reward for sample in samples]),
        "accuracy": _mean([sample.reward_parts.get("score", 0.0) >= 1.0 for sample in samples]),
        "reward_failed": float(sum(sample.reward_parts.get("failed", 0.0) for sample in samples)),
        "groups": float(len({sample.key.group for sample in samples})),
        "groups_kept": float(len(kept)),
        "rows_trained": float(sum(sample.trained for sample in samples)),
        "response_length_mean": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
        "cut_off_fraction": _mean([sample.completion.finish_reason == "length" for sample in samples]),
        "entropy": float(-rollout.mean()) if rollout.size else 0.0,
        "logprob_gap_mean": float(gap.mean()) if gap.size else 0.0,
        "logprob_gap_max": float(gap.max()) if gap.size else 0.0,
        "scored_tokens": float(gap.size),
        "kl": _kl(samples),
        "staleness_max": float(version - oldest),
    }


def _kl(samples: Sequence[Sample]) -> float:
    referenced = [sample for sample in samples if sample.reference_logprobs]
    if not referenced:
        return 0.0
    ours = torch.tensor([value for sample in referenced for value in sample.trainer_logprobs])
    reference = torch.tensor([value for sample in referenced for value in sample.reference_logprobs])
    return float(kl_per_token(ours, reference, "k3").mean())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _pairs(parts: dict[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in parts.items()]


def _text(messages: str | list[dict[str, str]]) -> str:
    return messages if isinstance(messages, str) else _json(messages)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
