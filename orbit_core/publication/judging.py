"""Whether a candidate may replace the adapter that serves: both answered the same prompts on the same base.

A question that either of them was trained on is no evidence: it is left out, and the verdict says how many were. (With
a growing pool of prompts this does not happen, see data/split.py; with rows removed or another held-out file it does.)
A candidate is promoted if its greedy accuracy is not below that of the promoted adapter by more than the tolerance,
nor below that of the bare base: an adapter that makes things worse never serves.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from orbit_core.data.prompts import read_prompts
from orbit_core.data.split import question_key, words_key
from orbit_core.errors import InputError, OrbitError
from orbit_core.evaluation.statistics import mcnemar_p_value
from orbit_core.store.artifacts import Artifact, ArtifactStore


@dataclass(frozen=True)
class Verdict:
    """Accuracies are greedy, over `prompts` held-out questions that none of the adapters was trained on."""

    promote: bool
    prompts: int
    left_out: int  # held-out questions that an earlier adapter was trained on
    unknown: int  # earlier adapters whose training prompts are gone from the store
    base: float
    candidate: float
    promoted: float | None
    gained: int  # prompts that the candidate answers and its rival (promoted adapter, else base) does not
    lost: int
    tolerance: float

    @property
    def p_value(self) -> float:
        return mcnemar_p_value(self.gained, self.lost)

    @property
    def sentence(self) -> str:
        rival = self.base if self.promoted is None else self.promoted
        name = "the bare base" if self.promoted is None else "the promoted adapter"
        sign = "not below" if self.promote else "below"
        if not self.promote and self.promoted is not None and self.base > self.promoted:
            name, rival = "the bare base", self.base  # the higher bar
        return (
            f"held-out accuracy {self.candidate:.1%}, {sign} {rival:.1%} of {name} (tolerance {self.tolerance:g}): "
            f"{self.prompts} prompts, {self.gained} gained, {self.lost} lost, p = {self.p_value:.2g}"
        )


def judge(candidate: Artifact, rival: Artifact | None, tolerance: float = 0.0) -> Verdict:
    """The verdict on two evaluate artifacts, `rival` being that of the promoted adapter. InputError when they did not
    answer the same prompts on the same base, or when no unseen question is left."""
    if not 0 <= tolerance <= 1:
        raise InputError("tolerance", "an accuracy from 0 to 1", f"{tolerance}")
    ours = _rows(candidate)
    theirs = _rows(rival) if rival else None
    if rival and theirs is not None:
        _check_comparable(candidate, rival, ours, theirs)
    trained_on, unknown = _seen(rival) if rival else (set(), 0)
    kept = [index for index, row in enumerate(ours) if words_key(row["prompt"]) not in trained_on]
    if not kept:
        raise InputError(
            "held-out prompts", "questions that the promoted adapter was not trained on", "none", "hold out others"
        )
    before, after = ([bool(ours[i][f"{name}_right"]) for i in kept] for name in ("before", "after"))
    other = [bool(theirs[i]["after_right"]) for i in kept] if theirs else None
    bars = [before, other] if other else [before]
    against = other or before
    return Verdict(
        promote=all(_not_below(after, bar, tolerance) for bar in bars),
        prompts=len(kept),
        left_out=len(ours) - len(kept),
        unknown=unknown,
        base=_mean(before),
        candidate=_mean(after),
        promoted=_mean(other) if other else None,
        gained=sum(now and not was for now, was in zip(after, against, strict=True)),
        lost=sum(was and not now for now, was in zip(after, against, strict=True)),
        tolerance=tolerance,
    )


def _rows(evaluated: Artifact) -> list[dict[str, Any]]:
    content = evaluated.store.read(f"{evaluated.prefix}/samples.parquet")
    columns = ["id", "prompt", "before_right", "after_right"]
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(content), columns=columns).to_pylist()
    return rows


def _check_comparable(
    candidate: Artifact, rival: Artifact, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> None:
    for name in ("quantized", "data"):
        mine, other = (artifact.manifest.inputs[name]["digest"] for artifact in (candidate, rival))
        if mine != other:
            raise InputError(f"comparison of two evaluations: {name}", str(mine), str(other), "evaluate both on one")
    if [(row["id"], row["prompt"]) for row in ours] != [(row["id"], row["prompt"]) for row in theirs]:
        raise OrbitError("comparison of two evaluations: their samples.parquet list other prompts")


def _seen(rival: Artifact) -> tuple[set[str], int]:
    """Questions that the promoted adapter, or one that it was started from, was trained on; and how many of these
    have no prompts in the store any more."""
    artifacts = ArtifactStore(rival.store)
    keys: set[str] = set()
    read: set[str] = set()
    unknown, train = 0, rival.manifest.inputs["train"]["digest"]
    while train:
        trained = artifacts.find("train", train)
        if trained is None:
            return keys, unknown + 1
        digest = str(trained.manifest.inputs["data"]["digest"])
        data = artifacts.find("data", digest)
        unknown += data is None
        if data is not None and digest not in read:
            read.add(digest)
            keys |= _questions(data)
        start = trained.manifest.inputs.get("warm_start", {})
        train = start.get("digest") if start.get("step") == "train" else None
    return keys, unknown


def _questions(data: Artifact) -> set[str]:
    with tempfile.TemporaryDirectory(prefix="orbit-") as folder:
        table = Path(folder) / "train.parquet"
        data.store.download(f"{data.prefix}/train.parquet", table)
        return {question_key(prompt) for prompt in read_prompts(table)}


def _not_below(marks: list[bool], bar: list[bool], tolerance: float) -> bool:
    """By counts: a difference of two rounded fractions could fall on the wrong side of the tolerance."""
    return sum(marks) >= sum(bar) - tolerance * len(bar) - 1e-9


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)
