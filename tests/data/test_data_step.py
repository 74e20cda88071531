"""data: two tables, and no held-out question in the one that training reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import RECIPE, SmallRun

from orbit_core.data.prompts import read_prompts
from orbit_core.data.split import question_key
from orbit_core.errors import InputError
from orbit_core.recipe import Recipe


def run_data(root: Path, data: dict[str, Any], seed: int = 0) -> tuple[SmallRun, dict[str, Any]]:
    run = SmallRun(root, Recipe.parse({**RECIPE, "data": data, "seed": seed}))
    return run, run.run("data")


def tables(run: SmallRun) -> tuple[list[Any], list[Any]]:
    return tuple(read_prompts(run.output("data") / f"{name}.parquet") for name in ("train", "heldout"))  # type: ignore


def write_questions(path: Path, questions: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": q, "label": "x"}) + "\n" for q in questions))
    return str(path)


GENERATED = RECIPE["data"]
QUESTIONS = [f"What is {i} times {j}?" for i in range(6) for j in range(6)]


def test_training_never_sees_a_held_out_prompt(tmp_path: Path) -> None:
    rows = write_questions(tmp_path / "rows.jsonl", QUESTIONS)
    heldout = write_questions(tmp_path / "heldout.jsonl", ["What is 2 times 3?", "What is 9 times 9?"])
    sources = [
        GENERATED,
        {"kind": "file", "path": rows, "heldout": 5},
        {"kind": "file", "path": rows, "heldout_path": heldout},
    ]
    for i, source in enumerate(sources):
        run, facts = run_data(tmp_path / str(i), source)
        train, held = tables(run)
        assert {question_key(prompt) for prompt in train}.isdisjoint(question_key(prompt) for prompt in held)
        assert facts == {"train": len(train), "heldout": len(held)}
        assert train and held


def test_given_held_out_rows_are_kept_as_they_are_and_their_questions_leave_training(tmp_path: Path) -> None:
    heldout = write_questions(tmp_path / "heldout.jsonl", ["What is 2 times 3?", "What is 9 times 9?"])
    source = {"kind": "file", "path": write_questions(tmp_path / "rows.jsonl", QUESTIONS), "heldout_path": heldout}
    train, held = tables(run_data(tmp_path, source)[0])
    assert [prompt.messages for prompt in held] == ["What is 2 times 3?", "What is 9 times 9?"]
    assert len(train) == len(QUESTIONS) - 2  # 2 times 3, and 3 times 2


def test_the_tables_are_a_function_of_the_recipe(tmp_path: Path) -> None:
    def contents(name: str, seed: int) -> list[bytes]:
        run, _ = run_data(tmp_path / name, GENERATED, seed)
        return [(run.output("data") / f"{side}.parquet").read_bytes() for side in ("train", "heldout")]

    first = contents("a", 1)
    assert contents("b", 1) == first
    assert all(other != one for other, one in zip(contents("c", 2), first, strict=True))


def test_a_pool_too_small_for_the_held_out_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="draw a larger pool"):
        run_data(tmp_path, {**GENERATED, "pool": 20, "heldout": 20})


def test_training_rows_that_are_all_held_out_are_refused(tmp_path: Path) -> None:
    rows = write_questions(tmp_path / "rows.jsonl", ["a b", "c d"])
    heldout = write_questions(tmp_path / "heldout.jsonl", ["b a", "d c", "e"])
    with pytest.raises(InputError, match=r"questions that heldout\.jsonl does not have"):
        run_data(tmp_path, {"kind": "file", "path": rows, "heldout_path": heldout})
