"""Held out by question, not by row.

Two prompts with the same words in any order (`29 + 97` and `97 + 29`, or a question drawn twice) are one question and
lie on one side, so a model cannot be credited for an answer it was taught in mirror image. The order in which
questions are held out is a hash of (seed, question): the same for every pool that contains them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from orbit_core.data.prompts import prompt_text
from orbit_core.errors import InputError
from orbit_core.rl.types import Prompt


def question_key(prompt: Prompt) -> str:
    """The bag of words of the question, as text."""
    return words_key(prompt_text(prompt))


def words_key(text: str) -> str:
    """The bag of words of a text, as text."""
    return " ".join(sorted(re.findall(r"\w+|[^\w\s]", text)))


def split(prompts: Sequence[Prompt], heldout: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out): `heldout` questions are held out, one row of each, and no question is on both sides.

    The other rows of a held-out question are in neither, so that each held-out row is an independent trial.
    Raises InputError when nothing would remain to train on.
    """
    questions: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        questions.setdefault(question_key(prompt), []).append(prompt)
    order = sorted(questions, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    taken = set(order[:heldout])
    held = [questions[key][0] for key in order[:heldout]]
    train = [prompt for key, rows in questions.items() if key not in taken for prompt in rows]
    if len(held) < heldout or not train:
        raise InputError(
            f"{len(prompts)} prompts ({len(questions)} distinct questions)",
            f"more than the {heldout} to hold out",
            f"{len(held)} held out and {len(train)} left for training",
            "hold out fewer, draw a larger pool or give more rows",
        )
    return train, held


def without_questions(prompts: Iterable[Prompt], heldout: Iterable[Prompt]) -> list[Prompt]:
    """The prompts whose question is not among the held-out ones."""
    taken = {question_key(prompt) for prompt in heldout}
    return [prompt for prompt in prompts if question_key(prompt) not in taken]
