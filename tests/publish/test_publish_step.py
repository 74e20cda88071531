"""publish: what a person takes away computes what was trained, and says where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_run import RECIPE, SmallRun, opened_by_transformers
from transformers import AutoModelForCausalLM

from orbit_core.adapters.peft_io import load_adapter
from orbit_core.checkpoints.hf import HFCheckpoint
from orbit_core.data.encode import load_tokenizer
from orbit_core.data.prompts import read_prompts
from orbit_core.errors import OrbitError
from orbit_core.publication.card import write_card
from orbit_core.publication.merged import write_merged
from orbit_core.recipe import Recipe
from orbit_core.rollout import load_rollout_engine
from orbit_core.steps import publish
from orbit_core.steps.contract import StepContext
from orbit_core.store.digests import digest_path, sha256_file

ANSWER = "16,12>126"


def sequences(run: SmallRun) -> list[tuple[list[int], list[int]]]:
    tokenizer = load_tokenizer(run.output("quantize"))
    prompts = read_prompts(run.output("data") / "heldout.parquet")[:6]
    return [(tokenizer.encode(str(prompt.messages)), tokenizer.encode(ANSWER)) for prompt in prompts]


def our_logprobs(run: SmallRun) -> torch.Tensor:
    """[prompts, tokens], by the rollout engine with the published adapter."""
    engine = load_rollout_engine(run.recipe.engines, run.output("quantize"), run.recipe.adapter)
    engine.stage_adapter(1, load_adapter(run.output("publish") / "adapter", run.recipe.adapter))
    engine.activate_adapter(1)
    return torch.stack(engine.score(sequences(run)))


def their_logprobs(run: SmallRun, model: Any) -> torch.Tensor:
    rows = []
    for prompt, response in sequences(run):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].float()
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        rows.append(logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.stack(rows)


def test_peft_loads_the_adapter_on_the_quantised_base_and_computes_the_same(run: SmallRun) -> None:
    base = opened_by_transformers(run.output("quantize"))
    alone = their_logprobs(run, base)
    model = PeftModel.from_pretrained(base, run.output("publish") / "adapter").eval()
    assert (their_logprobs(run, model) - our_logprobs(run)).abs().max() < 1e-5
    assert (our_logprobs(run) - alone).abs().max() > 1e-2  # the adapter is not the identity


def test_the_merged_model_computes_the_same_up_to_the_rounding_of_its_weights(run: SmallRun) -> None:
    merged = AutoModelForCausalLM.from_pretrained(run.output("publish") / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert (their_logprobs(run, merged) - our_logprobs(run)).abs().max() < 2e-2


def test_a_merged_model_in_shards_is_the_same_model(run: SmallRun, tmp_path: Path) -> None:
    tensors = load_adapter(run.output("publish") / "adapter", run.recipe.adapter)
    quantized = HFCheckpoint(run.output("quantize"))
    write_merged(quantized, tensors, run.recipe.adapter, tmp_path, max_shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    sharded, whole = HFCheckpoint(tmp_path), HFCheckpoint(run.output("publish") / "merged")
    assert sharded.metas == whole.metas
    assert all(torch.equal(sharded.tensor(name), whole.tensor(name)) for name in whole.metas)


@pytest.mark.parametrize("number_format", ["fp8", "nvfp4", "mxfp4", "bf16"])
def test_every_format_merges_into_a_plain_bf16_model(run: SmallRun, tmp_path: Path, number_format: str) -> None:
    recipe = {**RECIPE, "precision": {"format": number_format}}
    other = SmallRun(tmp_path, Recipe.parse(recipe))
    (tmp_path / "pretrain").symlink_to(run.output("pretrain"))
    other.run("quantize")
    tensors = load_adapter(run.output("train") / "adapter", run.recipe.adapter)
    write_merged(HFCheckpoint(other.output("quantize")), tensors, run.recipe.adapter, tmp_path / "merged")
    metas = HFCheckpoint(tmp_path / "merged").metas
    assert metas == HFCheckpoint(run.output("pretrain")).metas


def test_the_manifest_names_everything_that_went_in_and_came_out(run: SmallRun) -> None:
    output = run.output("publish")
    manifest = json.loads((output / "manifest.json").read_text())
    digests = manifest["digests"]
    for name, step in {"base": "pretrain", "quantized": "quantize", "data": "data", "train": "train"}.items():
        assert digests[name] == run.specs[step].digest
    assert digests["adapter"] == json.loads((run.output("train") / "summary.json").read_text())["adapter_digest"]
    assert Recipe.parse(manifest["recipe"]).algorithm == run.recipe.algorithm
    assert manifest["code"]["version"]
    found = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == found - {"manifest.json", "README.md"}
    assert all(sha256_file(output / name) == digest for name, digest in manifest["files"].items())


def test_equal_runs_publish_equal_bytes_and_no_path_of_the_machine(run: SmallRun, tmp_path: Path) -> None:
    run.run("publish", into=tmp_path / "again")
    assert digest_path(tmp_path / "again") == digest_path(run.output("publish"))
    for name in ("manifest.json", "README.md", "adapter/adapter_config.json"):
        assert str(run.root) not in (run.output("publish") / name).read_text()


def test_the_card_says_what_it_can_do_and_what_it_is_not(run: SmallRun) -> None:
    card = (run.output("publish") / "README.md").read_text()
    accuracy = json.loads((run.output("evaluate") / "evaluation.json").read_text())["after"]["greedy"]["accuracy"]
    for text in (f"{accuracy:.1%}", "PeftModel.from_pretrained", "base_model: small-base", "A demonstration"):
        assert text in card


def test_a_gain_that_chance_explains_is_called_so(run: SmallRun) -> None:
    manifest = json.loads((run.output("publish") / "manifest.json").read_text())
    manifest["evaluation"]["gains"]["greedy"]["interval"] = [-0.1, 0.1]
    assert "within what chance explains" in write_card(run.recipe, manifest, merged=False)
    manifest["evaluation"]["gains"]["greedy"]["interval"] = [0.1, 0.2]
    assert "within what chance explains" not in write_card(run.recipe, manifest, merged=False)


def test_an_adapter_that_is_not_the_evaluated_one_is_not_published(run: SmallRun, tmp_path: Path) -> None:
    evaluation = json.loads((run.output("evaluate") / "evaluation.json").read_text())
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "evaluation.json").write_text(json.dumps({**evaluation, "adapter_digest": "0" * 64}))
    inputs = {"train": run.output("train"), "evaluate": tmp_path / "evaluate", "quantized": run.output("quantize")}
    output = tmp_path / "out"
    output.mkdir()
    context = StepContext(run.specs["publish"], inputs, output, tmp_path, lambda *_, **__: None)
    with pytest.raises(OrbitError, match="not the one that was trained and evaluated"):
        publish.run(context)
