"""The base model: a function of recipe, prompts and seed, in files that transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import RECIPE, SmallRun
from transformers import AutoModelForCausalLM, AutoTokenizer

from orbit_core.data.encode import load_tokenizer
from orbit_core.data.prompts import read_prompts
from orbit_core.errors import InputError
from orbit_core.homework.pretraining import pretrain
from orbit_core.homework.vocabulary import build_tokenizer
from orbit_core.recipe import PretrainedModel, Recipe
from orbit_core.rl.types import Prompt
from orbit_core.store.digests import digest_path

QUESTION = "State the final answer to the following arithmetic problem: 29 + 97 ="


def pretrained(root: Path, **changes: Any) -> SmallRun:
    run = SmallRun(root, Recipe.parse({**RECIPE, **changes}))
    run.run("data", "pretrain")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return pretrained(tmp_path_factory.mktemp("pretrained"))


def test_a_question_is_seven_tokens_and_its_work_one_a_character(run: SmallRun) -> None:
    tokenizer = load_tokenizer(run.output("pretrain"))
    assert len(tokenizer.encode(QUESTION)) == 7
    assert len(tokenizer.encode("-16,12>126;")) == len("-16,12>126;")
    assert tokenizer.decode(tokenizer.encode(QUESTION + "16,12>126")) == QUESTION + "16,12>126"


def test_transformers_reads_the_tokenizer_alike(run: SmallRun) -> None:
    ours = load_tokenizer(run.output("pretrain"))
    theirs = AutoTokenizer.from_pretrained(run.output("pretrain"))
    for text in (QUESTION, "16,12>126", "what\nelse"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(run: SmallRun, tmp_path: Path) -> None:
    digest = digest_path(run.output("pretrain"))
    assert digest_path(pretrained(tmp_path / "again").output("pretrain")) == digest
    assert digest_path(pretrained(tmp_path / "other", seed=4).output("pretrain")) != digest


def test_transformers_opens_the_model_and_stops_at_the_end_token(run: SmallRun) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.output("pretrain"))
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "Qwen3ForCausalLM"
    assert model.generation_config.eos_token_id == load_tokenizer(run.output("pretrain")).eos_token_id
    ids = torch.tensor([load_tokenizer(run.output("pretrain")).encode(QUESTION)])
    assert torch.isfinite(model(ids).logits).all()


def test_the_homework_is_learned(run: SmallRun) -> None:
    prompts = read_prompts(run.output("data") / "train.parquet")
    losses: list[float] = []
    settings = PretrainedModel(hidden_size=64, intermediate_size=96, layers=1, heads=2, key_value_heads=2, steps=80)
    pretrain(settings, prompts, 0, lambda step, loss: losses.append(loss))
    assert losses[0] > 2.5  # guessing among 21 tokens is 3.0 nats
    assert sum(losses[-10:]) / 10 < 1.2


def test_only_training_prompts_are_read(tmp_path: Path) -> None:
    run = SmallRun(tmp_path, Recipe.parse(RECIPE))
    run.run("data")
    (run.output("data") / "heldout.parquet").unlink()
    run.run("pretrain")


def test_other_data_than_sums_is_refused(tmp_path: Path) -> None:
    settings = PretrainedModel(steps=1)
    with pytest.raises(InputError, match=r"use model\.kind local"):
        pretrain(settings, [Prompt("p", "How many legs has a spider?", "8", {})], 0)
    with pytest.raises(InputError, match="one text before the numbers"):
        pretrain(settings, [Prompt("p", "A: 1 + 2 =", "3", {}), Prompt("q", "B: 1 + 2 =", "3", {})], 0)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="a multiple of heads"):
        pretrain(PretrainedModel(hidden_size=100, heads=3, steps=1), [Prompt("p", "1 + 2 =", "3", {})], 0)


def test_characters_that_the_tokenizer_does_not_know_become_unknown() -> None:
    tokenizer = build_tokenizer("Compute ")
    unknown = tokenizer.token_to_id("<unk>")
    assert tokenizer.encode("Compute 1 + x =").ids.count(unknown) == 1
