"""Who may replace whom: the same prompts on the same base, none that either was trained on, and not worse."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbit_core.data.prompts import write_prompts
from orbit_core.errors import InputError
from orbit_core.publication.judging import judge
from orbit_core.rl.types import Prompt
from orbit_core.steps.contract import InputRef, StepSpec
from orbit_core.store import Store, open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore

BASE = InputRef(step="quantize", digest="ba5e" * 16)


class Bench:
    """Artifacts of steps, made through the real writer, in one store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, open_store(folder / "store")

    def data(self, train: Sequence[str]) -> InputRef:
        folder = self._folder()
        write_prompts(folder / "train.parquet", [Prompt(text, text, "", {}) for text in train])
        return self._publish("data", folder).ref()

    def train(self, data: InputRef, start: InputRef | None = None) -> InputRef:
        folder = self._folder()
        (folder / "summary.json").write_text("{}")
        return self._publish("train", folder, data=data, **({"warm_start": start} if start else {})).ref()

    def evaluate(
        self, asked: Sequence[str], base: str, adapter: str, train: InputRef, data: InputRef, on: InputRef = BASE
    ) -> Artifact:
        """`base`, `adapter`: one character a prompt, + for right."""
        folder = self._folder()
        columns = {
            "id": [str(number) for number in range(len(asked))],
            "prompt": list(asked),
            "before_right": [mark == "+" for mark in base],
            "after_right": [mark == "+" for mark in adapter],
        }
        pq.write_table(pa.table(columns), folder / "samples.parquet")
        spec = self._publish("evaluate", folder, train=train, data=data, quantized=on)
        found = ArtifactStore(self.store).find("evaluate", spec.digest)
        assert found is not None
        return found

    def _folder(self) -> Path:
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def _publish(self, step: str, folder: Path, **inputs: InputRef) -> StepSpec:
        spec = StepSpec(step=step, version=1, params={"n": folder.name}, inputs=inputs, store=self.store.url)
        ArtifactStore(self.store).publish(spec, folder, {})
        return spec


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def pair(
    bench: Bench, base: str, promoted: str, candidate: str, learnt: Sequence[str] = ("other",)
) -> tuple[Artifact, Artifact]:
    """Evaluations of a candidate and of the promoted adapter it started from, which was trained on `learnt`."""
    asked = [f"question {number}" for number in range(len(base))]
    now, old = bench.data(["new"]), bench.train(bench.data(learnt))
    new = bench.train(now, start=old)
    return bench.evaluate(asked, base, candidate, new, now), bench.evaluate(asked, base, promoted, old, now)


def test_equal_is_not_worse_and_one_prompt_less_is(bench: Bench) -> None:
    equal = judge(*pair(bench, "----", "++--", "--++"))
    assert equal.promote and (equal.gained, equal.lost, equal.promoted) == (2, 2, 0.5)
    worse = judge(*pair(bench, "----", "+++-", "++--"))
    assert not worse.promote and "below 75.0% of the promoted adapter" in worse.sentence
    assert judge(*pair(bench, "----", "+++-", "++--"), tolerance=0.25).promote


def test_an_adapter_below_the_bare_base_never_serves(bench: Bench) -> None:
    verdict = judge(*pair(bench, "+++-", "+---", "++--"))
    assert not verdict.promote and verdict.candidate > (verdict.promoted or 0)
    assert "below 75.0% of the bare base" in verdict.sentence
    assert not judge(pair(bench, "+---", "----", "----")[0], None).promote
    assert judge(pair(bench, "+---", "----", "-+--")[0], None).promote


def test_questions_that_an_earlier_adapter_was_trained_on_are_no_evidence(bench: Bench) -> None:
    """In any order of their words, and however far back in the chain of warm starts."""
    asked = ["1 + 2", "3 + 4", "5 + 6", "7 + 8"]
    now = bench.data(["new"])
    grandparent = bench.train(bench.data(["2 + 1"]))
    parent = bench.train(bench.data(["4 + 3", "9 + 9"]), start=grandparent)
    child = bench.train(now, start=parent)
    candidate = bench.evaluate(asked, "----", "--++", child, now)
    promoted = bench.evaluate(asked, "----", "+++-", parent, now)
    verdict = judge(candidate, promoted)
    assert verdict.promote and (verdict.prompts, verdict.left_out, verdict.unknown) == (2, 2, 0)
    assert (verdict.candidate, verdict.promoted) == (1.0, 0.5)


def test_where_all_were_seen_nobody_is_promoted(bench: Bench) -> None:
    with pytest.raises(InputError, match="hold out others"):
        judge(*pair(bench, "--", "--", "++", learnt=["question 0", "question 1"]))


def test_training_prompts_that_are_gone_are_counted_and_not_guessed(bench: Bench) -> None:
    candidate, promoted = pair(bench, "----", "----", "++++", learnt=["question 0"])
    train = ArtifactStore(bench.store).find("train", str(promoted.manifest.inputs["train"]["digest"]))
    assert train is not None
    _delete(bench.store, "data", str(train.manifest.inputs["data"]["digest"]))
    verdict = judge(candidate, promoted)
    assert (verdict.unknown, verdict.left_out) == (1, 0)
    _delete(bench.store, "train", train.manifest.digest)
    assert judge(candidate, promoted).unknown == 1


def _delete(store: Store, step: str, digest: str) -> None:
    store.delete(f"artifacts/{step}/{digest[:16]}.json")


def test_other_prompts_or_another_base_are_no_comparison(bench: Bench) -> None:
    now, train = bench.data(["new"]), bench.train(bench.data(["old"]))
    asked = ["a", "b"]
    ours = bench.evaluate(asked, "--", "++", train, now)
    with pytest.raises(InputError, match="quantized"):
        judge(ours, bench.evaluate(asked, "--", "+-", train, now, on=InputRef(step="quantize", digest="00" * 32)))
    with pytest.raises(InputError, match="data"):
        judge(ours, bench.evaluate(asked, "--", "+-", train, bench.data(["newer"])))
    with pytest.raises(InputError, match="tolerance"):
        judge(ours, None, tolerance=-0.1)


@settings(max_examples=30)
@given(rows=st.lists(st.tuples(*[st.sampled_from("+-")] * 3), min_size=1, max_size=12), hundredths=st.integers(0, 100))
def test_promotion_is_not_being_worse_than_anyone(
    rows: list[tuple[str, str, str]], hundredths: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In exact arithmetic: 7 of 10 is not below 8 of 10 by more than 0.1."""
    base, promoted, candidate = ("".join(column) for column in zip(*rows, strict=True))
    verdict = judge(*pair(Bench(tmp_path_factory.mktemp("bench")), base, promoted, candidate), hundredths / 100)
    right = {name: marks.count("+") for name, marks in zip("bpc", (base, promoted, candidate), strict=True)}
    assert verdict.promote == (100 * right["c"] >= 100 * max(right["b"], right["p"]) - hundredths * len(rows))
    assert verdict.gained - verdict.lost == right["c"] - right["p"]
