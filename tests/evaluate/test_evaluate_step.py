"""evaluate: same prompts, same random numbers, adapter off and on, by the engine that will be deployed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from small_run import SmallRun, opened_by_transformers

from orbit_core.adapters.layout import random_adapter
from orbit_core.adapters.peft_io import load_adapter, save_adapter
from orbit_core.data.encode import load_tokenizer
from orbit_core.data.prompts import read_prompts
from orbit_core.errors import InputError
from orbit_core.recipe import LoRA
from orbit_core.rl.rewards import Judge
from orbit_core.steps import evaluate
from orbit_core.steps.contract import StepContext


def read(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    evaluation = json.loads((directory / "evaluation.json").read_text())
    return evaluation, pq.read_table(directory / "samples.parquet").to_pylist()


def with_adapter(run: SmallRun, root: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """evaluate with another adapter in place of the trained one; returns the step's output."""
    save_adapter(root / "train" / "adapter", tensors, run.recipe.adapter)
    inputs = {"data": run.output("data"), "quantized": run.output("quantize"), "train": root / "train"}
    output = root / "evaluate"
    output.mkdir()
    context = StepContext(run.specs["evaluate"], inputs, output, root, lambda *_, **__: None)
    evaluate.run(context)
    return output


def test_figures_follow_from_the_answers_that_are_kept(run: SmallRun) -> None:
    evaluation, rows = read(run.output("evaluate"))
    assert evaluation["prompts"] == len(rows) == run.recipe.evaluation.prompts
    for side in ("before", "after"):
        right = sum(row[f"{side}_right"] for row in rows)
        assert evaluation[side]["greedy"]["correct"] == right
        assert evaluation[side]["greedy"]["accuracy"] == right / len(rows)
        sampled = sum(row[f"{side}_sampled_right"] for row in rows) / (4 * len(rows))
        assert evaluation[side]["pass_at_k"]["1"]["value"] == pytest.approx(sampled)
    gains = evaluation["gains"]["greedy"]
    difference = sum(row["after_right"] - row["before_right"] for row in rows)
    assert gains["gained"] - gains["lost"] == difference == round(gains["difference"] * len(rows))


def test_right_is_what_the_judge_says(run: SmallRun) -> None:
    prompts = {prompt.id: prompt for prompt in read_prompts(run.output("data") / "heldout.parquet")}
    judge = Judge(run.recipe.reward)
    for row in read(run.output("evaluate"))[1]:
        assert judge.judge([(prompts[row["id"]], row["after"])])[0].right == row["after_right"]


def test_before_is_the_quantised_model_as_transformers_runs_it(run: SmallRun) -> None:
    model = opened_by_transformers(run.output("quantize"))
    tokenizer = load_tokenizer(run.output("quantize"))
    for row in read(run.output("evaluate"))[1][:4]:
        ids = torch.tensor([tokenizer.encode(row["prompt"])])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert tokenizer.decode(out[0, ids.shape[1] :].tolist()) == row["before"]


def test_an_adapter_that_does_nothing_changes_nothing(run: SmallRun, tmp_path: Path) -> None:
    trained = load_adapter(run.output("train") / "adapter", run.recipe.adapter)
    output = with_adapter(run, tmp_path, {name: torch.zeros_like(tensor) for name, tensor in trained.items()})
    evaluation, rows = read(output)
    assert all(row["before"] == row["after"] for row in rows)
    assert all(row["before_sampled_right"] == row["after_sampled_right"] for row in rows)
    assert evaluation["gains"]["greedy"]["gained"] == evaluation["gains"]["greedy"]["lost"] == 0
    assert evaluation["after"]["kl_to_base"] == pytest.approx(0.0, abs=1e-6)


def test_the_adapter_is_what_makes_the_difference(run: SmallRun, tmp_path: Path) -> None:
    trained = load_adapter(run.output("train") / "adapter", run.recipe.adapter)
    evaluation, rows = read(with_adapter(run, tmp_path, random_adapter(trained, seed=0, scale=1.0)))
    assert any(row["before"] != row["after"] for row in rows)
    assert evaluation["after"]["kl_to_base"] > 0.01


def test_the_same_spec_gives_the_same_bytes(run: SmallRun, tmp_path: Path) -> None:
    run.run("evaluate", into=tmp_path / "again")
    for name in ("evaluation.json", "samples.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (run.output("evaluate") / name).read_bytes()


def test_an_adapter_of_another_kind_is_refused(run: SmallRun, tmp_path: Path) -> None:
    other = SmallRun(run.root, run.recipe.model_copy(update={"adapter": LoRA()}))
    with pytest.raises(InputError, match="adapter directory"):
        other.run("evaluate", into=tmp_path / "other")
