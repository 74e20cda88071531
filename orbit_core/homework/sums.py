"""Column work for chains of sums and differences, as a pupil writes it, and as a sloppy one does.

    29 + 97       16,12>126             ones 9+7 = 16, tens 2+9+1 = 12, read off: 126
    15 - 43       -18,02>-28            the sign, then 43 - 15: ones 3-5 borrows (1) and leaves 8, tens 4-1-1 = 02
    29 + 97 - 50  16,12>126;06,17,00>76 one operation after the other; what stands after the last > is the answer

Each column is two digits, carry (or borrow) and digit, ones first. Sloppy pupils know when there is a carry and still
mostly leave it out: they write 06 for 16, and the next column goes without it. Only a column that makes exactly ten
they know by heart. Because they forget more often than not, the likeliest answer is right only where there is nothing
to forget, while every right answer is within reach of sampling.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

QUESTION = re.compile(r"(?P<lead>.*?)(?P<first>\d+)(?P<rest>(?: [+-] \d+)+) =", re.DOTALL)
ALPHABET = "0123456789,>;-"


@dataclass(frozen=True)
class Chain:
    """first ± term ± term ..., as signed terms."""

    terms: tuple[int, ...]

    @property
    def value(self) -> int:
        return sum(self.terms)


@dataclass(frozen=True)
class Sloppiness:
    forget_carry: float  # probability that a carry or borrow is left out
    slip: float  # probability that one digit of one operation's columns is wrong


def parse_question(question: str) -> tuple[str, Chain] | None:
    """(text before the numbers, the chain), or None when the question is not a chain of sums and differences."""
    match = QUESTION.fullmatch(question)
    if match is None:
        return None
    rest = re.findall(r"([+-]) (\d+)", match["rest"])
    terms = (int(match["first"]), *(int(number) if sign == "+" else -int(number) for sign, number in rest))
    return match["lead"], Chain(terms)


def write_work(chain: Chain, sloppiness: Sloppiness = Sloppiness(0, 0), rng: random.Random | None = None) -> str:
    """The column work of the chain; with `Sloppiness(0, 0)` it ends in the right answer."""
    rng = rng or random.Random(0)
    total, work = chain.terms[0], []
    for term in chain.terms[1:]:
        total, text = _operation(total, term, sloppiness, rng)
        work.append(text)
    return ";".join(work)


def _operation(left: int, right: int, sloppiness: Sloppiness, rng: random.Random) -> tuple[int, str]:
    """The result as written (right or not) and the text of one operation."""
    adding = (left < 0) == (right < 0)
    large, small = sorted((abs(left), abs(right)), reverse=True)
    negative = left < 0 if adding or abs(left) >= abs(right) else right < 0
    width = len(str(large))
    wrong_column = rng.randrange(width) if rng.random() < sloppiness.slip else None
    columns, carry = [], 0
    for place in range(width):
        upper, lower = (number // 10**place % 10 for number in (large, small))
        column = upper + lower + carry if adding else upper - lower - carry
        carry, digit = abs(column // 10), column % 10
        if carry and column != 10 and rng.random() < sloppiness.forget_carry:
            carry = 0
        if place == wrong_column:
            digit = (digit + rng.randrange(1, 10)) % 10
        columns.append((carry, digit))
    # A borrow left over in the last column (after a slip) has nothing to borrow from; only a sum's carry is written.
    digits = ([columns[-1][0]] if adding else []) + [digit for _, digit in reversed(columns)]
    magnitude = int("".join(map(str, digits)))
    sign = "-" if negative and (large != small or adding) else ""
    result = -magnitude if sign else magnitude
    written = ",".join(f"{carry}{digit}" for carry, digit in columns)
    return result, f"{sign}{written}>{'-' if sign else ''}{magnitude}"
