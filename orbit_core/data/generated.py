"""Prompts from reasoning-gym: procedurally generated questions whose answers a program can judge.

A data set of reasoning-gym seeds its item i with `seed + i`, so data sets with neighbouring seeds share nearly all
their questions; the seed given to it is therefore a hash of the run's. Questions drawn twice are kept once.
`metadata` keeps the whole entry: it is what `score_answer` judges with.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from orbit_core.errors import InputError
from orbit_core.recipe import ReasoningGym
from orbit_core.rl.types import Prompt


def draw(
    source: ReasoningGym, seed: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Prompt]:
    """Distinct questions of `source` that match `keep`, in the order drawn; a function of (source, seed).

    Raises InputError for an unknown data set, a config that it refuses, or a data set whose answers cannot be judged
    from JSON.
    """
    dataset = _create(source, seed)
    keep = _pattern(source.keep)
    seen: dict[str, Prompt] = {}
    for index in range(source.pool):
        if index % 1000 == 0:
            progress(index, source.pool)
        entry = dataset[index]
        question = entry["question"]
        if question in seen or not keep.search(question):
            continue
        metadata = {"dataset": source.dataset, "config": source.config, "entry": _as_json(entry, source.dataset)}
        seen[question] = Prompt(f"{source.dataset}-{index:06d}", question, entry["answer"], metadata)
    prompts = list(seen.values())
    if not prompts:
        raise InputError(
            f"data set {source.dataset}",
            f"questions that match {source.keep!r}",
            f"none among {source.pool}, for example {dataset[0]['question']!r}",
            "change data.keep",
        )
    _require_json_judges(dataset, prompts[0], source.dataset)
    return prompts


def _create(source: ReasoningGym, seed: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if source.dataset not in DATASETS:
        near = difflib.get_close_matches(source.dataset, DATASETS, n=3)
        raise InputError(
            f"data.dataset {source.dataset!r}",
            "a data set of reasoning-gym",
            "no such data set",
            f"did you mean {' or '.join(near)}?" if near else "see reasoning_gym.factory.DATASETS for the names",
        )
    reserved = sorted({"seed", "size"} & set(source.config))
    if reserved:
        raise InputError(
            "data.config", "the data set's own options", f"{reserved}", "use the recipe's seed and data.pool"
        )
    spread = int.from_bytes(hashlib.sha256(f"{seed}\n{source.dataset}".encode()).digest()[:4]) >> 1
    try:
        return reasoning_gym.create_dataset(source.dataset, seed=spread, size=source.pool, **source.config)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"data.config {source.config}", f"options of {source.dataset}", str(error), "mend data.config"
        ) from None


def _pattern(keep: str | None) -> re.Pattern[str]:
    try:
        return re.compile(keep or "")
    except re.error as error:
        raise InputError(f"data.keep {keep!r}", "a regular expression", str(error), "mend data.keep") from None


def _as_json(entry: dict[str, Any], dataset: str) -> dict[str, Any]:
    try:
        as_read: dict[str, Any] = json.loads(json.dumps(entry))
    except TypeError as error:
        raise InputError(
            f"data set {dataset}", "entries that JSON can carry", str(error), "choose another data set"
        ) from None
    return as_read


def _require_json_judges(dataset: Any, prompt: Prompt, name: str) -> None:
    """The data set's own answer must be right when judged with the entry as the reward will read it."""
    score = dataset.score_answer(prompt.label, prompt.metadata["entry"])
    if score != 1.0:
        raise InputError(
            f"data set {name}",
            "its own answer to score 1.0 after a trip through JSON",
            f"{score}",
            "choose another data set; this one cannot be judged from a stored prompt table",
        )
