"""What only fits together badly: adapter and model, prompts and context, adapter and base, reward and answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import World, edit_json, make_base, replaced, row

from orbit_core.store import open_store
from orbit_core.store.rollouts import RolloutReader


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"kind": "oft", "block_size": 16, "targets": ["q_prj"]}, ["q_prj", "did you mean q_proj?"]),
        ({"kind": "lora", "targets": ["experts"]}, ["no module for experts", "q_proj"]),
        ({"kind": "lora", "targets": []}, ["no target"]),
        ({"kind": "oft", "block_size": 48}, ["block size 48", "divisor of the input width 128", "remainder 32"]),
    ],
    ids=["misspelt target", "target of another model", "no target", "OFT block does not divide"],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused_by_the_gate(
    world: World, adapter: dict[str, Any], words: list[str]
) -> None:
    error = world.refused("preflight", adapter=adapter)
    assert all(word in str(error) for word in words), str(error)


def test_a_prompt_longer_than_the_context_is_refused_before_training(world: World, tmp_path: Path) -> None:
    rows = [row(number) for number in range(12)]
    rows[7] = row(7, id="long", prompt="1+1=" * 16)  # 64 tokens
    long = world.with_rows(tmp_path / "rows.jsonl", b"".join(rows))
    error = long.refused("preflight")
    assert "prompt long of" in error.what and "60 tokens" in error.expected and "64 tokens" in error.found


def test_the_recipes_own_context_length_is_kept(world: World) -> None:
    model = {"kind": "local", "path": str(world.base)}
    assert world.made("preflight", model={**model, "context_length": 9}).facts["ok"]
    error = world.refused("preflight", model={**model, "context_length": 8})
    assert "at most 4 tokens" in error.expected and "5 tokens" in error.found
    answer = world.refused(
        "preflight", model={**model, "context_length": 8}, algorithm={"sampling": {"max_new_tokens": 8}}
    )
    assert "max_new_tokens" in answer.what


@pytest.fixture
def adapter(world: World, tmp_path: Path) -> Path:
    """A copy of an adapter that a run on this base has published."""
    return Path(shutil.copytree(Path(world.made("train").url) / "adapter", tmp_path / "adapter"))


def test_an_adapter_of_this_base_is_a_start(world: World, adapter: Path) -> None:
    assert world.made("train", warm_start=str(adapter)).facts["steps"] == 1


def test_an_adapter_of_another_base_is_refused_though_its_shapes_fit(
    world: World, adapter: Path, tmp_path: Path
) -> None:
    other = World(world.folder, make_base(tmp_path / "other"), world.rows)
    replaced("model.norm.weight", lambda t: t + 1)(other.base)
    error = other.refused("train", warm_start=str(adapter))
    assert other.specs()["quantize"].digest[:16] in error.expected
    assert world.specs()["quantize"].digest[:16] in error.found and "this base" in error.fix


ADAPTERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "exact Cayley": (lambda d: config(d, use_cayley_neumann=False), ["use_cayley_neumann", "another convention"]),
    "other terms": (lambda d: config(d, num_cayley_neumann_terms=3), ["num_cayley_neumann_terms", "5", "3"]),
    "shared blocks": (lambda d: config(d, block_share=True), ["block_share"]),
    "other block": (lambda d: config(d, oft_block_size=32), ["'block_size': 16", "'block_size': 32"]),
    "LoRA": (lambda d: config(d, peft_type="LORA", r=8), ["oft_R", "lora_A"]),
    "further modules": (lambda d: config(d, modules_to_save=["lm_head"]), ["modules_to_save"]),
    "not finite": (lambda d: values(d, lambda t: t + float("nan")), ["finite numbers"]),
    "other shape": (lambda d: values(d, lambda t: t[:, :-1]), ["shape (8, 120)", "(8, 119)"]),
    "integers": (lambda d: values(d, lambda t: t.to(torch.int8)), ["floating point", "int8"]),
    "truncated": (lambda d: cut(d / "adapter_model.safetensors"), ["truncated"]),
    "pickled": (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), ["pickled"]),
    "no JSON": (lambda d: cut(d / "adapter_config.json"), ["JSON"]),
}


def config(directory: Path, **changes: Any) -> None:
    edit_json(directory / "adapter_config.json", **changes)


def values(directory: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    replaced("base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight", change)(directory)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


@pytest.mark.parametrize(("damage", "words"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_means_something_else_is_refused(
    world: World, adapter: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(adapter)
    error = world.refused("train", warm_start=str(adapter))
    assert all(word in str(error) for word in words), str(error)


def reward(function: str) -> dict[str, Any]:
    return {"kind": "python", "function": f"bad_rewards:{function}", "timeout_seconds": 0.05}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", ["8 of 8 failed", "ZeroDivisionError: of course"]),
        ("nan", ["8 of 8 failed", "finite numbers"]),
        ("hangs", ["8 of 8 failed", "longer than 0.05 s"]),
        ("swallows_everything", ["8 of 8 failed", "longer than 0.05 s"]),
        ("not_there", ["not_there"]),
    ],
)
def test_a_reward_that_mostly_fails_stops_the_run_with_the_reason(
    world: World, function: str, words: list[str]
) -> None:
    error = world.refused("train", reward=reward(function))
    assert all(word in str(error) for word in words), str(error)


@pytest.mark.parametrize("function", ["raises_at_times", "nan_at_times", "hangs_at_times"])
def test_where_a_reward_fails_at_times_the_sample_is_marked_and_the_step_goes_on(world: World, function: str) -> None:
    trained = world.made("train", reward=reward(function))
    rows = RolloutReader(open_store(world.store), trained.facts["run"]).rows(0).to_pylist()
    failed = [each for each in rows if {"name": "failed", "value": 1.0} in each["reward_parts"]]
    assert len(rows) == 8 and len(failed) == 2 and all(each["reward"] == 0 for each in failed)
    metrics = json.loads((Path(trained.url) / "metrics.jsonl").read_text())
    assert metrics["reward_failed"] == 2
