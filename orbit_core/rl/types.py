"""The data that flows through the loop: prompts, completions, samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One row of the prompt table (train.parquet or heldout.parquet of the `data` step)."""

    id: str
    messages: str | list[dict[str, str]]  # plain text, or chat messages rendered by the tokenizer's template
    label: Any  # what the reward judges against; JSON
    metadata: dict[str, Any]


@dataclass(frozen=True)
class SampleKey:
    """Everything that the randomness of one sample depends on."""

    seed: int
    step: int
    group: int
    sample: int


@dataclass(frozen=True)
class Request:
    """One completion to generate. The same key gives the same uniforms, whatever else is in the batch."""

    prompt_ids: tuple[int, ...]
    key: SampleKey


@dataclass(frozen=True)
class Completion:
    """What an engine returns: ids without the prompt, the stop token included when there is one."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the temperature-scaled full softmax, no top-p/top-k renormalisation
    versions: tuple[int, ...]  # adapter version that produced each token
    finish_reason: str  # "stop" | "length"


@dataclass
class Sample:
    """One row of the rollouts while a step is being made."""

    prompt: Prompt
    key: SampleKey
    prompt_ids: tuple[int, ...]
    completion: Completion
    text: str
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    advantage: float = 0.0
    trainer_logprobs: tuple[float, ...] = ()
    reference_logprobs: tuple[float, ...] = ()
    trained: bool = True  # False: filtered out (its group had no variance)
    reward_seconds: float = 0.0  # wall clock of judging it
