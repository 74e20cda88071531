"""Judging: every kind of reward, and what happens when a judge fails."""

from __future__ import annotations

import collections
import functools
import json
import os
import time

import peoples_rewards
import pytest

from orbit_core.errors import InputError
from orbit_core.recipe import Algorithm, ReasoningGym, Reward
from orbit_core.rl.rewards import Judge
from orbit_core.rl.shaping import set_advantages, set_rewards, subtract_kl
from orbit_core.rl.types import Completion, Prompt, Sample, SampleKey


@functools.lru_cache  # each has a process of its own
def judge(kind="python", **fields) -> Judge:
    if kind == "python":
        fields["function"] = f"peoples_rewards:{fields['function']}"
    return Judge(Reward.model_validate({"kind": kind, **fields}))


def scores(judge_: Judge, prompt: Prompt, *texts: str) -> list[float]:
    return [verdict.score for verdict in judge_.judge([(prompt, text) for text in texts])]


def test_exact_match_ignores_white_space_around_the_answer_only():
    prompt = Prompt("a", "2 + 2?", "4", {})
    assert scores(judge("exact_match"), prompt, "4", " 4\n", "4.", "5", "") == [1, 1, 0, 0, 0]
    assert scores(judge("exact_match"), Prompt("a", "?", 4, {}), "4") == [1]  # labels are JSON: a number will do


def test_only_the_text_after_the_last_mark_is_judged():
    prompt = Prompt("a", "2 + 2?", "4", {})
    marked = judge("exact_match", answer_after=">")
    assert scores(marked, prompt, "2>3>4", "4>5", "4") == [1, 0, 0]


@pytest.fixture(scope="module")
def sums() -> list[Prompt]:
    from orbit_core.data.generated import draw

    source = ReasoningGym(config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, pool=300)
    return [Prompt(p.id, p.messages, p.label, json.loads(json.dumps(p.metadata))) for p in draw(source, 0)]


def test_reasoning_gym_judges_with_the_entry_in_the_metadata(sums):
    strict = judge("reasoning_gym", answer_after=">")
    for prompt in sums[:50]:
        wrong = str(int(prompt.label) + 1)
        assert scores(strict, prompt, f"1,2>{prompt.label}", f"1,2>{wrong}", prompt.label) == [1, 0, 0]


def test_part_marks_count_only_when_asked_for(sums):
    answer = f"it is {sums[0].label}"  # chain_sum gives a part mark for the number among other words
    assert scores(judge("reasoning_gym"), sums[0], answer) == [0]
    part = scores(judge("reasoning_gym", right_only=False), sums[0], answer)[0]
    assert 0 < part < 1


def test_judging_a_step_of_the_demo_costs_next_to_nothing(sums):
    strict = judge("reasoning_gym", answer_after=">")
    answers = [(prompt, f"1,2>{prompt.label}") for prompt in sums[:256]]
    strict.judge(answers)
    best = min(timed(lambda: strict.judge(answers)) for _ in range(5))
    assert best < 0.05


def timed(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def test_math_verify_knows_equal_mathematics():
    math = judge("math_verify")
    assert scores(math, Prompt("m", "?", "1/2", {}), "\\boxed{\\frac{1}{2}}", "0.5", "$\\frac{2}{4}$", "1/3") == [
        1,
        1,
        1,
        0,
    ]
    assert scores(math, Prompt("m", "?", "\\frac{\\sqrt{3}}{2}", {}), "$\\sqrt{3}/2$", "$\\sqrt{2}/2$") == [1, 0]


def test_python_function_gets_prompt_response_label_and_metadata_if_it_takes_it():
    assert scores(judge(function="gives_number", right_only=False), Prompt("a", "p", "l", {}), "abc") == [0.3]
    verdict = judge(function="sees_the_chat").judge([(Prompt("a", peoples_rewards.CHAT, None, {}), "x")])[0]
    assert verdict.right and verdict.parts == {"raw": 1.0, "turns": 2.0}
    assert scores(judge(function="sees_metadata"), Prompt("a", "p", "l", {"hint": "h"}), "h", "g") == [1, 0]


@pytest.mark.parametrize(
    "reference, found",
    [("no_such_module_here:f", "no_such_module_here"), ("json:no_such", "no_such"), ("json", "json")],
)
def test_a_function_that_is_not_there_is_named(reference, found):
    with pytest.raises(InputError, match=found):
        Judge(Reward(kind="python", function=reference))


def test_a_failed_verdict_counts_as_zero_and_says_why():
    prompt = Prompt("q7", "p", "l", {})
    answers = ["good", "7", "good", "nan", "good", "text", "good", "dict"]
    verdicts = judge(function="fails_on_digits").judge([(prompt, answer) for answer in answers])
    assert [verdict.score for verdict in verdicts] == [1, 0] * 4
    assert [bool(verdict.failure) for verdict in verdicts] == [False, True] * 4
    assert "ZeroDivisionError: digits (prompt q7, answer '7')" in verdicts[1].failure
    assert "needs the key 'score'" in verdicts[7].failure


def test_a_reward_that_mostly_fails_is_refused_with_the_reason():
    prompt = Prompt("q7", "p", "l", {})
    with pytest.raises(InputError, match=r"(?s)fails_on_digits.*2 of 3 failed.*ZeroDivisionError: digits"):
        judge(function="fails_on_digits").judge([(prompt, answer) for answer in ("1", "2", "good")])


def test_a_judge_that_hangs_is_stopped_at_the_limit():
    prompt = Prompt("a", "p", "l", {})
    limited = judge(function="hangs_on_stuck", timeout_seconds=0.1)
    start = time.perf_counter()
    verdicts = limited.judge([(prompt, text) for text in ("fine", "stuck", "fine", "fine")])
    assert time.perf_counter() - start < 5
    assert [verdict.score for verdict in verdicts] == [1, 0, 1, 1]
    assert verdicts[1].failure == "took longer than 0.1 s (prompt a, answer 'stuck')"


def test_a_judge_that_swallows_the_limit_is_interrupted_again_and_its_late_answer_not_taken():
    limited, prompt = judge(function="comes_back_late", timeout_seconds=0.05), Prompt("a", "p", "l", {})
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"took longer than 0\.05 s"):
        limited.judge([(prompt, "x")])
    assert time.perf_counter() - start < 5


def test_what_no_signal_interrupts_costs_one_answer_and_shows_the_line(monkeypatch, capfd):
    monkeypatch.setattr("orbit_core.rl.judge_process.GRACE", 0.5)
    prompt, limited = Prompt("a", "p", "l", {}), judge(function="computes_in_c", timeout_seconds=0.5)
    verdicts = limited.judge([(prompt, text) for text in ("x", "for ever", "y")])
    assert [verdict.score for verdict in verdicts] == [1, 0, 1]
    assert "took longer than 0.5 s and had to be killed" in verdicts[1].failure
    assert "in computes_in_c" in capfd.readouterr().err


def test_a_judge_that_takes_its_process_along_costs_one_answer():
    prompt = Prompt("a", "p", "l", {})
    verdicts = judge(function="crashes").judge([(prompt, text) for text in ("x", "crash", "y")])
    assert [verdict.score for verdict in verdicts] == [1, 0, 1]
    assert "took its process along, twice: SIGSEGV" in verdicts[1].failure


def test_a_process_that_was_ended_from_outside_costs_nothing(tmp_path):
    prompt = Prompt("a", "p", "l", {"mark": str(tmp_path / "mark")})
    assert scores(judge(function="ended_once_from_outside"), prompt, "x") == [1]


def test_what_a_judge_prints_is_shown_and_confuses_nobody(capfd):
    assert scores(judge(function="prints"), Prompt("a", "p", "l", {}), "x", "y") == [1, 1]
    assert capfd.readouterr().err.count("a judge thinks aloud") == 2


def test_with_the_judge_ends_its_process():
    kept = Judge(Reward(kind="exact_match"))
    pid = kept._process._process.pid
    del kept
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def samples_of(rewards: list[float], finish="stop", size=4) -> list[Sample]:
    completion = Completion((1, 2), (-0.5, -0.5), (0, 0), finish)
    prompt = Prompt("a", "p", "l", {})
    keys = [SampleKey(0, 0, i // size, i % size) for i in range(len(rewards))]
    return [
        Sample(
            prompt, key, (1,), completion, str(reward), trainer_logprobs=(-0.5, -0.5), reference_logprobs=(-1.0, -0.7)
        )
        for key, reward in zip(keys, rewards, strict=True)
    ]


def shaped(rewards, algorithm, shuffle=None, **kinds) -> list[Sample]:
    samples = samples_of(rewards, **kinds)
    verdicts = judge(function="says_its_score", right_only=False).judge([(s.prompt, s.text) for s in samples])
    set_rewards(samples, verdicts, algorithm, shuffle)
    return samples


def test_shuffled_rewards_are_a_permutation_and_the_judged_scores_stay():
    rewards = [float(i % 3) for i in range(64)]
    one, same, other = (shaped(rewards, Algorithm(), (0, step)) for step in (1, 1, 2))
    rewards_of = lambda samples: [sample.reward for sample in samples]  # noqa: E731
    assert collections.Counter(rewards_of(one)) == collections.Counter(rewards)
    assert rewards_of(one) != rewards and rewards_of(one) == rewards_of(same) != rewards_of(other)
    assert [sample.reward_parts["score"] for sample in one] == rewards


def test_a_cut_off_answer_pays_the_overlong_penalty():
    algorithm = Algorithm(overlong_penalty=0.25)
    assert {sample.reward for sample in shaped([1.0] * 4, algorithm, finish="length")} == {0.75}
    assert {sample.reward for sample in shaped([1.0] * 4, algorithm)} == {1.0}


def test_kl_in_the_reward_is_that_of_the_whole_answer():
    algorithm = Algorithm.model_validate({"kl": {"coefficient": 0.1, "estimator": "k1", "place": "reward"}})
    samples = shaped([1.0, 0.0, 0.0, 0.0], algorithm)
    subtract_kl(samples, algorithm)
    assert samples[0].reward == pytest.approx(1.0 - 0.1 * (0.5 + 0.2))
    assert samples[0].reward_parts["kl"] == pytest.approx(-0.07)


def test_advantages_are_within_groups():
    samples = shaped([1.0, 0, 0, 0, 1, 1, 1, 1, 5, 5, 6, 6], Algorithm(prompts_per_step=3))
    trained = set_advantages(samples, Algorithm(samples_per_prompt=4, prompts_per_step=3))
    assert [sample.key.group for sample in trained] == [0] * 4 + [2] * 4
    assert [sample.advantage for sample in samples[4:8]] == [0.0] * 4
    for group in (samples[:4], samples[8:]):
        assert sum(sample.advantage for sample in group) == pytest.approx(0)
