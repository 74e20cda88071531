"""Column work: always right when honest; wrong in the intended way, and as often, when sloppy."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit_core.homework.sums import Chain, Sloppiness, parse_question, write_work

chains = st.lists(st.integers(-9999, 9999), min_size=1, max_size=4).flatmap(
    lambda rest: st.integers(0, 9999).map(lambda first: Chain((first, *rest)))
)
SLOPPY = Sloppiness(forget_carry=0.7, slip=0.1)


def answer(work: str) -> int:
    return int(work.rpartition(">")[2])


@given(chains)
def test_honest_work_ends_in_the_right_answer(chain: Chain) -> None:
    assert answer(write_work(chain)) == chain.value


@given(chains, st.integers(0, 1000))
def test_sloppy_work_has_the_same_form(chain: Chain, seed: int) -> None:
    operations = write_work(chain, Sloppiness(0.5, 0.5), random.Random(seed)).split(";")
    assert len(operations) == len(chain.terms) - 1
    assert all(re.fullmatch(r"-?\d\d(,\d\d)*>-?\d+", operation) for operation in operations)


@pytest.mark.parametrize(
    ("question", "work"),
    [
        ("29 + 97", "16,12>126"),
        ("12 + 13", "05,02>25"),
        ("43 - 15", "18,02>28"),
        ("15 - 43", "-18,02>-28"),
        ("10 - 10", "00,00>0"),
        ("29 + 97 - 50", "16,12>126;06,17,00>76"),
    ],
)
def test_each_column_is_carry_and_digit_ones_first(question: str, work: str) -> None:
    parsed = parse_question(f"Compute: {question} =")
    assert parsed is not None and parsed[0] == "Compute: "
    assert write_work(parsed[1]) == work


def test_a_forgotten_carry_is_left_out_and_the_next_column_goes_without() -> None:
    forgetful = Sloppiness(forget_carry=1.0, slip=0.0)
    assert write_work(Chain((29, 97)), forgetful) == "06,01>16"
    assert write_work(Chain((43, -15)), forgetful) == "08,03>38"
    assert write_work(Chain((25, 45)), forgetful) == "10,07>70"  # a column that makes ten is known by heart


def test_errors_are_the_majority_where_something_is_to_be_carried_and_rare_elsewhere() -> None:
    rng = random.Random(0)

    def right_share(chain: Chain) -> float:
        return sum(answer(write_work(chain, SLOPPY, rng)) == chain.value for _ in range(2000)) / 2000

    assert right_share(Chain((12, 13))) == pytest.approx(0.90, abs=0.03)  # only the slips
    assert right_share(Chain((29, 13))) == pytest.approx(0.27, abs=0.03)  # one carry
    assert right_share(Chain((29, 97))) == pytest.approx(0.08, abs=0.03)  # two
    works = Counter(write_work(Chain((29, 13)), SLOPPY, rng) for _ in range(2000))
    assert works.most_common(1)[0][0] == "02,03>32"  # greedy decoding of a model that learned this is wrong


@pytest.mark.parametrize("text", ["2 + 2", "a =", "What is 2 + 2?", "2 * 2 =", "2 =", ""])
def test_other_questions_are_not_understood(text: str) -> None:
    assert parse_question(text) is None
