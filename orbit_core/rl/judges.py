"""The judges that a recipe can name. Each turns (prompt, answer) into {"score": ..., further parts}."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from orbit_core.errors import InputError
from orbit_core.recipe import Reward
from orbit_core.rl.types import Prompt

Scorer = Callable[[Prompt, str], dict[str, float]]


def make_scorer(settings: Reward) -> Scorer:
    """The judge that `settings.kind` names; InputError when its function or library is not there."""
    if settings.kind == "python":
        assert settings.function is not None  # the recipe's validator sees to it
        return python_function(settings.function)
    return {"reasoning_gym": reasoning_gym, "math_verify": math_verify, "exact_match": exact_match}[settings.kind]()


def exact_match() -> Scorer:
    """1.0 when the answer is the label, letter for letter but for white space around it."""

    def score(prompt: Prompt, answer: str) -> dict[str, float]:
        return {"score": float(answer.strip() == label_text(prompt.label).strip())}

    return score


def reasoning_gym() -> Scorer:
    """The data set's own `score_answer`, with the entry that the prompt table keeps in `metadata`."""
    import reasoning_gym as library

    @lru_cache(maxsize=64)
    def dataset(name: str, config: str) -> Any:
        return library.create_dataset(name, seed=0, size=1, **json.loads(config))

    def score(prompt: Prompt, answer: str) -> dict[str, float]:
        metadata = prompt.metadata
        missing = {"dataset", "entry"} - metadata.keys()
        if missing:
            raise KeyError(f"metadata of a reasoning-gym prompt holds dataset and entry; {sorted(missing)} missing")
        judge = dataset(metadata["dataset"], json.dumps(metadata.get("config", {}), sort_keys=True))
        return {"score": float(judge.score_answer(answer, metadata["entry"]))}

    return score


def math_verify() -> Scorer:
    """Equal as mathematics, by math-verify. Its own time limits are off: they use the timer that ours uses."""
    import logging

    import math_verify as library

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they warn of each call without a limit of their own

    @lru_cache(maxsize=65_536)
    def gold(label: str) -> Any:
        for text in (label, f"${label}$"):
            if parsed := library.parse(text, parsing_timeout=None):
                return parsed
        raise ValueError(f"label {label!r} is no mathematics that math-verify can read")

    def score(prompt: Prompt, answer: str) -> dict[str, float]:
        found = library.parse(answer, parsing_timeout=None)
        return {"score": float(library.verify(gold(label_text(prompt.label)), found, timeout_seconds=None))}

    return score


def python_function(reference: str) -> Scorer:
    """A person's `module:function`, called with (prompt, response, label), and metadata=... if it takes that.

    `prompt` is the text or the chat messages as they stand in the prompt table. It returns a number, or a mapping of
    numbers with the key "score".
    """
    function = _import(reference)
    takes_metadata = "metadata" in inspect.signature(function).parameters

    def score(prompt: Prompt, answer: str) -> dict[str, float]:
        further = {"metadata": prompt.metadata} if takes_metadata else {}
        result = function(prompt.messages, answer, prompt.label, **further)
        if not isinstance(result, dict):
            return {"score": float(result)}
        if "score" not in result:
            raise KeyError(f"{reference} returned {sorted(result)}; a mapping needs the key 'score'")
        return {str(name): float(value) for name, value in result.items()}

    return score


def label_text(label: Any) -> str:
    """A label as text: strings as they are, anything else as JSON."""
    return label if isinstance(label, str) else json.dumps(label, ensure_ascii=False, sort_keys=True)


def _import(reference: str) -> Callable[..., Any]:
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise InputError("reward.function", "'module:function'", repr(reference), "name both")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a person's module raises while it is imported
        found = f"{type(error).__name__}: {error}"
        fix = "mend it, install what it needs or set PYTHONPATH"
        raise InputError(f"reward.function {reference}", "a module that can be imported", found, fix) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "nothing of that name" if function is None else type(function).__name__
        fix = "mend the name"
        raise InputError(f"reward.function {reference}", f"a function {name!r} in {module_name}", found, fix)
    checked: Callable[..., Any] = function
    return checked
