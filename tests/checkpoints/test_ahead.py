"""Pieces come in order, one ahead; what goes wrong with one is raised in its turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial

import pytest

from orbit_core.checkpoints.ahead import ahead


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_all_come_in_their_order(count: int) -> None:
    assert list(ahead(partial(int, number) for number in range(count))) == list(range(count))


def test_one_is_made_while_another_is_used_and_no_more_than_that() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(number: int) -> int:
        made.append(number)
        if number == 1:
            second.set()
        return number

    with closing(ahead(partial(make, number) for number in range(5))) as pieces:
        assert next(pieces) == 0
        assert second.wait(60) and made == [0, 1]


def test_an_error_is_raised_in_its_turn_and_ends_the_thread() -> None:
    def fail() -> int:
        raise ValueError("torn")

    calls: list[Callable[[], int]] = [lambda: 1, fail, lambda: 3]
    pieces = ahead(calls)
    assert next(pieces) == 1
    with pytest.raises(ValueError, match="torn"):
        next(pieces)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
