"""The train step on the real embedded engines: a small Qwen3, packed to INT4, a few steps of the real loop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from orbit_core.errors import Interrupted
from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import Holder, run_step
from orbit_core.store import open_store
from orbit_core.store.lease import LeaseLost
from orbit_core.store.rollouts import TIMING_COLUMNS, RolloutReader, rollouts_path

ROOT = Path(__file__).parents[2]
STEPS = 4


def recipe(**algorithm) -> Recipe:
    return Recipe.parse(
        {
            "model": {"kind": "pretrain", "hidden_size": 64, "intermediate_size": 96, "layers": 2, "steps": 4},
            "adapter": {"kind": "oft", "block_size": 16},
            "data": {
                "kind": "reasoning_gym",
                "config": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
                "keep": "^[^-]*$",
                "pool": 400,
                "heldout": 20,
            },
            "reward": {"kind": "python", "function": f"{__name__}:many_different_tokens", "right_only": False},
            "engines": {"threads": 1},
            "algorithm": {
                "steps": STEPS,
                "prompts_per_step": 4,
                "samples_per_prompt": 4,
                "sampling": {"max_new_tokens": 6},
                "optimizer": {"warmup_steps": 0, "learning_rate": 1e-2},
                "kl": {"coefficient": 1e-3},
                **algorithm,
            },
        }
    )


def specs_of(store: Path, **algorithm) -> dict[str, StepSpec]:
    """The steps up to train; the gate before it is another test's matter."""
    specs = plan(recipe(**algorithm), str(store))
    train = specs["train"]
    inputs = {name: ref for name, ref in train.inputs.items() if name != "preflight"}
    return {**specs, "train": train.model_copy(update={"inputs": inputs})}


def many_different_tokens(prompt, response, label) -> float:
    """A dense reward that a model of four training steps can already earn."""
    return len(set(response)) / 6


def ignore(event: str, /, **values) -> None:
    pass


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store with everything that train needs."""
    folder = tmp_path_factory.mktemp("store")
    specs = specs_of(folder)
    for step in ("data", "pretrain", "quantize", "convert"):
        run_step(specs[step], ignore)
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="module")
def trained(store: Path):
    return run_step(specs_of(store)["train"], ignore)


def rows(store: Path, run: str) -> list[dict]:
    reader = RolloutReader(open_store(store), run)
    return [row for step in reader.steps() for row in reader.rows(step).drop_columns(list(TIMING_COLUMNS)).to_pylist()]


def test_the_artifact_holds_adapter_metrics_and_summary(store, trained):
    from orbit_core.adapters.digest import tensors_digest
    from orbit_core.adapters.peft_io import load_adapter

    output, facts = Path(trained.url), trained.facts
    tensors = load_adapter(output / "adapter", recipe().adapter)
    assert tensors_digest(tensors) == facts["adapter_digest"]
    assert any(tensor.abs().max() > 0 for tensor in tensors.values())  # it has moved
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(STEPS))
    wanted = {
        "reward_mean", "accuracy", "groups_kept", "response_length_mean", "response_length_max", "logprob_gap_mean",
        "logprob_gap_max", "kl", "loss", "grad_norm", "clip_fraction", "importance_weight_mean",
        "importance_capped_fraction", "max_orthogonality_error", "learning_rate", "entropy", "seconds_rollout",
        "seconds_score", "seconds_reward", "seconds_update", "seconds_publish", "seconds_commit",
    }  # fmt: skip
    for row in metrics:
        assert wanted <= set(row)
    assert json.loads((output / "summary.json").read_text()) == facts
    assert facts["rows"] == STEPS * 16 and facts["run"] == specs_of(store)["train"].digest[:16]


def test_trainer_and_rollout_engine_agree_on_every_sampled_token(trained):
    assert trained.facts["logprob_gap_mean"] <= 1e-6
    assert trained.facts["logprob_gap_max"] <= 1e-5


def test_on_policy_ratio_is_one(trained):
    for line in (Path(trained.url) / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["ratio_mean"] == pytest.approx(1.0, abs=1e-6)


def test_sigterm_then_start_again_is_the_uninterrupted_run(store, trained, tmp_path):
    """As a fresh store would go: stopped after its first step, resumed by another process's try."""
    fresh = borrowed(store, tmp_path)
    stops = iter([False, True])
    with pytest.raises(Interrupted, match=f"1 of {STEPS}"):
        run_step(specs_of(fresh)["train"], ignore, should_stop=lambda: next(stops))
    resumed = run_step(specs_of(fresh)["train"], ignore)
    assert resumed.facts["adapter_digest"] == trained.facts["adapter_digest"]
    assert rows(fresh, resumed.facts["run"]) == rows(store, trained.facts["run"])


def test_kill_in_the_middle_of_the_real_run_then_start_again(store, trained, tmp_path):
    fresh = borrowed(store, tmp_path)
    spec = specs_of(fresh)["train"]
    file = tmp_path / "spec.json"
    file.write_text(spec.model_dump_json())
    script = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels'), str(Path(__file__).parent)]}\n"
    script += "from pathlib import Path; from orbit_core.steps.contract import StepSpec\n"
    script += "from orbit_core.steps.runner import run_step\n"
    script += f"run_step(StepSpec.model_validate_json(Path({str(file)!r}).read_text()), lambda *a, **k: None)\n"
    process = subprocess.Popen([sys.executable, "-c", script])
    committed = open_store(fresh)
    deadline = time.monotonic() + 60
    while not committed.exists(rollouts_path(spec.digest[:16], 1)) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = run_step(spec, ignore)
    assert again.facts["adapter_digest"] == trained.facts["adapter_digest"]
    assert rows(fresh, again.facts["run"]) == rows(store, trained.facts["run"])


def test_who_has_lost_the_lease_commits_nothing(store, tmp_path):
    """As a pod that was cut off: another one has claimed the next term by the time of the first commit."""
    fresh = borrowed(store, tmp_path)
    spec, committed = specs_of(fresh)["train"], open_store(fresh)

    def overtaken(event: str, /, **values) -> None:
        committed.put(f"leases/train-{spec.digest[:16]}/000002.json", b'{"holder": "pod-b", "seconds": 600}')

    with pytest.raises(LeaseLost, match="pod-b holds it, term 2"):
        run_step(spec, overtaken, holder=Holder("pod-a", lease_seconds=600))
    assert committed.list("rollouts/") == []


def borrowed(store: Path, tmp_path: Path) -> Path:
    """A store that has the artifacts before train, and no train."""
    fresh = tmp_path / "fresh"
    (fresh / "artifacts").mkdir(parents=True)
    for step in ("data", "pretrain", "quantize", "convert"):
        (fresh / "artifacts" / step).symlink_to(store / "artifacts" / step)
    return fresh


@pytest.mark.parametrize(
    "algorithm",
    [
        {"variant": "dapo", "oversample": 1.5, "overlong_penalty": 0.5, "updates_per_step": 2},
        {"variant": "dr_grpo", "kl": {"coefficient": 0.1, "estimator": "k1", "place": "reward"}},
        {"importance_sampling": {"level": "sequence", "cap": 1.5}, "kl": {"coefficient": 0.01, "estimator": "k2"}},
    ],
)
def test_variants_run_to_the_end(store, algorithm):
    artifact = run_step(specs_of(store, steps=2, **algorithm)["train"], ignore)
    last = json.loads((Path(artifact.url) / "metrics.jsonl").read_text().splitlines()[-1])
    table = pq.read_table(open_store(store).url_of(rollouts_path(artifact.facts["run"], 1)))
    if algorithm.get("variant") == "dapo":
        assert table.num_rows == 6 * 4 and last["updates"] == 2 and last["groups_kept"] <= 4
        cut = [row for row in table.to_pylist() if row["finish_reason"] == "length"]
        assert cut and all({"name": "overlong", "value": -0.5} in row["reward_parts"] for row in cut)
    if algorithm.get("kl", {}).get("place") == "reward":
        assert all("kl" in [part["name"] for part in row["reward_parts"]] for row in table.to_pylist())
    assert all(len(row["reference_logprobs"]) == len(row["response_token_ids"]) for row in table.to_pylist())


sys.path.insert(0, str(Path(__file__).parent))  # so that the reward is found under this file's own name
