"""The step: a report either way, exit code 42 when the gate says no."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from orbit_core.checkpoints.megatron import to_megatron
from orbit_core.data.prompts import write_prompts
from orbit_core.errors import ExitCode, GateError
from orbit_core.rl.types import Prompt
from orbit_core.steps import preflight
from orbit_core.steps.contract import InputRef, StepContext, StepSpec
from orbit_core.trainers.torch import TorchTrainer


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """What data, quantize and convert leave: a table, a quantised base with a tokenizer, a Megatron checkpoint."""
    prepared = tiny.prepare(tiny.reference(), "int4", tmp_path)
    words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(prepared.quantized / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    texts = [" ".join(f"w{3 + (i * j) % 30}" for j in range(2 + i % 5)) for i in range(100)]
    prompts = [Prompt(f"p{i}", text, "", {}) for i, text in enumerate(texts)]
    write_prompts(tmp_path / "data" / "train.parquet", prompts)
    write_prompts(tmp_path / "data" / "heldout.parquet", prompts[:3])
    return tmp_path


def context_of(directory: Path, events: list[dict[str, Any]], **preflight_settings: Any) -> StepContext:
    inputs = {name: directory / name for name in ("quantized", "converted", "data")}
    spec = StepSpec(
        step="preflight",
        version=1,
        params={
            "adapter": {"kind": "oft", "block_size": 16},
            "engines": {"threads": 1},
            "preflight": preflight_settings,
            "sampling": {"max_new_tokens": 6},
            "seed": 0,
        },
        inputs={name: InputRef(digest=f"digest-of-{name}", step=name) for name in inputs},
        store="unused",
    )
    output = directory / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    return StepContext(
        spec=spec,
        inputs=inputs,
        output=output,
        scratch=directory / "scratch",
        emit=lambda kind, **values: events.append({"kind": kind, **values}),
    )


def test_equal_engines_pass_and_the_report_is_written_and_shown(run_directory: Path) -> None:
    events: list[dict[str, Any]] = []
    facts = preflight.run(context_of(run_directory, events))
    report = json.loads((run_directory / "output" / "report.json").read_text())
    assert facts["ok"] and facts["tokens"] == report["logprobs"]["tokens"] and facts["mean_gap"] <= 1e-6
    assert report["verdict"] == "equal" and report["logprobs"]["prompts"] == 32
    assert report["digests"]["quantized"] == "digest-of-quantized"
    assert report["layout"]["trainer"] == {"tensor": 1, "pipeline": 1, "expert": 1}
    (shown,) = [event for event in events if event["kind"] == "report"]
    assert shown["name"] == "preflight" and shown["content"] == report


def swap_keys_and_values(quantized: Path, target: Path) -> None:
    shutil.copytree(quantized, target)
    tensors = load_file(target / "model.safetensors")
    swapped = {
        name.replace("k_proj", "*").replace("v_proj", "k_proj").replace("*", "v_proj")
        if "layers.1.self_attn" in name
        else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(swapped, target / "model.safetensors", metadata={"format": "pt"})


def test_a_trainer_checkpoint_with_swapped_keys_and_values_stops_the_run(run_directory: Path) -> None:
    swap_keys_and_values(run_directory / "quantized", run_directory / "spoiled")
    shutil.rmtree(run_directory / "converted")
    to_megatron(run_directory / "spoiled", run_directory / "converted")
    events: list[dict[str, Any]] = []
    with pytest.raises(GateError) as refused:
        preflight.run(context_of(run_directory, events))
    assert refused.value.exit_code == ExitCode.REFUSED == 42
    message = str(refused.value)
    assert "model.layers.1.self_attn.k_proj.weight_packed" in message
    assert "first drifting layer model.layers.1" in message
    report = json.loads((run_directory / "output" / "report.json").read_text())
    assert not report["ok"] and report["worst_tensor"].startswith("model.layers.1.self_attn.")
    assert [event["content"] for event in events if event["kind"] == "report"] == [report]
    engines = report["bytes"]["engines"]
    assert engines["rollout"]["ok"] and not engines["trainer"]["ok"]


def test_thresholds_of_the_recipe_are_used(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of each batch that the trainer scores a thousandth too high; the engines may differ by nothing else."""
    score = TorchTrainer.score

    def one_off(self: TorchTrainer, *given: Any, **how: Any) -> list[Tensor]:
        first, *others = score(self, *given, **how)
        return [first + torch.tensor([1e-3] + [0.0] * (len(first) - 1)), *others]

    monkeypatch.setattr(TorchTrainer, "score", one_off)
    report = preflight.run(context_of(run_directory, [], max_token_gap=1e-2, max_mean_gap=1e-2, prompts=40))
    assert report["ok"]
    with pytest.raises(GateError, match="log-probs"):
        preflight.run(context_of(run_directory, [], max_token_gap=1e-4, max_mean_gap=1e-2, prompts=40))
    report = json.loads((run_directory / "output" / "report.json").read_text())
    assert report["thresholds"]["token_gap"] == 1e-4 and report["logprobs"]["prompts"] == 40
    assert report["bytes"]["ok"]


def test_prompts_are_spread_over_the_table_and_short_tables_are_used_whole() -> None:
    rows = [[number] for number in range(100)]
    assert preflight.spread(rows, 500) == rows
    assert preflight.spread(rows, 4) == [rows[0], rows[25], rows[50], rows[75]]
