"""Held out by question: the law that makes every reported figure mean something."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit_core.data.split import question_key, split, without_questions
from orbit_core.errors import InputError
from orbit_core.rl.types import Prompt

sums = st.tuples(st.integers(1, 12), st.sampled_from("+-"), st.integers(1, 12)).map(lambda t: f"{t[0]} {t[1]} {t[2]} =")


def prompts_of(questions: list[str]) -> list[Prompt]:
    return [Prompt(f"p{i}", question, "", {}) for i, question in enumerate(questions)]


@given(st.lists(sums, min_size=2, max_size=80), st.integers(1, 10), st.integers(0, 5))
def test_no_question_is_on_both_sides(questions: list[str], heldout: int, seed: int) -> None:
    prompts = prompts_of(questions)
    try:
        train, held = split(prompts, heldout, seed)
    except InputError:
        assert len({question_key(prompt) for prompt in prompts}) <= heldout
        return
    assert {question_key(prompt) for prompt in train}.isdisjoint(question_key(prompt) for prompt in held)
    assert len(held) == heldout == len({question_key(prompt) for prompt in held})


@given(st.lists(sums, min_size=2, max_size=60, unique=True), st.integers(0, 5), st.randoms())
def test_which_questions_are_held_out_does_not_depend_on_their_order(questions, seed, rng) -> None:
    shuffled = list(questions)
    rng.shuffle(shuffled)
    try:
        sides = [split(prompts_of(order), 1, seed) for order in (questions, shuffled)]
    except InputError:
        return
    assert len({question_key(held[0]) for _, held in sides}) == 1


def test_the_mirror_image_of_a_question_is_the_same_question() -> None:
    same = ["29 + 97 =", "97 + 29 =", "97 +  29 ="]
    assert len({question_key(prompt) for prompt in prompts_of(same)}) == 1
    assert question_key(prompts_of(["29 - 97 ="])[0]) != question_key(prompts_of(same)[0])


def test_the_other_rows_of_a_held_out_question_are_in_neither_table() -> None:
    prompts = prompts_of(["1 + 2 =", "2 + 1 =", "3 + 4 ="])
    for seed in range(8):
        train, held = split(prompts, 1, seed)
        assert len(held) == 1
        assert len(train) == (1 if question_key(held[0]) == question_key(prompts[0]) else 2)


def test_another_seed_holds_out_other_questions() -> None:
    prompts = prompts_of([f"{i} + {j} =" for i in range(30) for j in range(i)])
    ids = [{prompt.id for prompt in split(prompts, 20, seed)[1]} for seed in range(3)]
    assert all(len(a & b) < 10 for a in ids for b in ids if a is not b)


def test_chat_messages_are_split_by_their_contents() -> None:
    chat = Prompt("a", [{"role": "user", "content": "1 + 2 ="}], "3", {})
    assert question_key(chat) == question_key(prompts_of(["2 + 1 ="])[0])


def test_nothing_left_to_train_on_is_refused() -> None:
    with pytest.raises(InputError, match="more than the 2 to hold out"):
        split(prompts_of(["1 + 2 =", "3 + 4 ="]), 2, 0)


def test_rows_that_ask_a_held_out_question_are_dropped() -> None:
    rows, held = prompts_of(["1 + 2 =", "5 + 6 ="]), prompts_of(["2 + 1 ="])
    assert [prompt.messages for prompt in without_questions(rows, held)] == ["5 + 6 ="]
