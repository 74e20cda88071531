"""Rewards as people write them, good and bad, for tests that name them as `module:function`."""

from __future__ import annotations

import collections
import itertools
import os
import signal
import time

SECONDS_A_SAMPLE = 0.02
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2?"}]


def same_digit(prompt, response, label):
    """Share of the answer that is the wanted digit."""
    return response.count(label) / max(1, len(response))


def names_a_one(prompt, response, label):
    """A task that a model of seven pretraining steps does now and then, so that there is something to learn."""
    return float("1" in response)


def names_a_one_slowly(prompt, response, label):
    """The same with a middle of the training to be disturbed in."""
    time.sleep(SECONDS_A_SAMPLE)
    return names_a_one(prompt, response, label)


def vowels(prompt, response, label):
    """A reward that an untrained model earns now and then, and a trained one often."""
    return float(sum(letter in "aeiou" for letter in response) >= 4)


def gives_number(prompt, response, label):
    return len(response) / 10


def says_its_score(prompt, response, label):
    return float(response)


def sees_the_chat(prompt, response, label):
    return {"score": float(prompt == CHAT), "turns": len(prompt)}


def sees_metadata(prompt, response, label, metadata):
    return float(metadata["hint"] == response)


def prints(prompt, response, label):
    print("a judge thinks aloud")
    return 1.0


def fails_on_digits(prompt, response, label):
    if response.isdigit():
        raise ZeroDivisionError("digits")
    return {"nan": float("nan"), "text": "many", "dict": {"points": 1}}.get(response, 1.0)


def hangs_on_stuck(prompt, response, label):
    try:
        while response == "stuck":
            time.sleep(0.001)
    except Exception:  # a careless judge must not swallow the limit
        return 1.0
    return 1.0


def comes_back_late(prompt, response, label):
    for _ in range(3):
        try:
            time.sleep(9)
        except BaseException:  # the most careless judge of all
            continue
    return 1.0


def computes_in_c(prompt, response, label):
    if response == "for ever":
        collections.deque(itertools.repeat(response), maxlen=0)
    return 1.0


def crashes(prompt, response, label):
    if response == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0


def ended_once_from_outside(prompt, response, label, metadata):
    try:
        os.close(os.open(metadata["mark"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return 1.0
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0
