"""`orbit`: instant help, short errors, exit codes, plans, steps by hand, rollouts on the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from processor_time import processor_seconds
from rich.console import Console

from flows.live import live_view
from flows.options import demo_recipe, load_recipe, parse_set
from orbit_core.errors import InputError
from orbit_core.recipe import LoRA
from orbit_core.store import open_store
from orbit_core.store.rollouts import SCHEMA, Commit, StateFile, encode_step, rollouts_path

STEPS = ("data", "pretrain", "quantize", "convert", "preflight", "train", "evaluate", "publish", "report")


def orbit(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    environment = {**os.environ, "COLUMNS": "150", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def recipe_with_file(folder: Path) -> Path:
    rows = [{"prompt": f"say {n}", "label": str(n)} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"kind": "pretrain"},
        "data": {"kind": "file", "path": str(folder / "rows.jsonl"), "heldout": 4},
        "reward": {"kind": "exact_match"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    times = []
    for _ in range(3):
        before = processor_seconds()
        assert "--help" in orbit("--help").stdout
        times.append(processor_seconds() - before)
    assert min(times) < 1.0, f"expected about 0.25 s of processor time, found {times}"
    code = "import sys, flows.cli; print(*(set(sys.modules) & {'torch', 'prefect', 'pyarrow', 'pydantic', 'yaml'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""


def test_every_step_has_a_command_with_help() -> None:
    listed = orbit("--help").stdout
    assert all(f" {step} " in listed for step in (*STEPS, "demo", "run", "rollouts"))
    assert "held-out" in orbit("evaluate", "--help").stdout.lower()


def test_a_dry_run_prints_the_recipe_and_the_steps_and_makes_nothing(tmp_path: Path) -> None:
    ran = orbit("run", str(recipe_with_file(tmp_path)), "--dry-run", "--set", "algorithm.steps=7", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    text, _, table = ran.stdout.partition("step ")
    assert yaml.safe_load(text)["algorithm"]["steps"] == 7
    rows = [line.split() for line in table.splitlines()[1:] if line.strip()]
    assert [row[0] for row in rows] == list(STEPS) and {row[2] for row in rows} == {"run"}
    assert not (tmp_path / ".orbit").exists()


def test_a_step_by_hand_runs_once_and_the_next_names_what_it_misses(tmp_path: Path) -> None:
    recipe = str(recipe_with_file(tmp_path))
    first = orbit("data", recipe, "--store", "s", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert (Path(first.stdout.strip()) / "heldout.parquet").exists()
    again = orbit("data", recipe, "--store", "s", cwd=tmp_path)
    assert again.stdout == first.stdout and "reused" in again.stderr
    missing = orbit("quantize", recipe, "--store", "s", cwd=tmp_path)
    assert missing.returncode == 42
    assert f"orbit pretrain {recipe} --store s" in missing.stderr
    plan = orbit("run", recipe, "--store", "s", "--dry-run", cwd=tmp_path).stdout
    assert [line.split()[2] for line in plan.splitlines() if line.startswith(("data ", "pretrain "))] == [
        "reused",
        "run",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "nowhere.yaml"), "nowhere.yaml"),
        (("run", "demo", "--set", "algorithm.stepps=3"), "did you mean 'steps'?"),
        (("run", "demo", "--set", "algorithm.steps"), "field.sub=value"),
        (("demo", "--precision", "int3"), "int4"),
        (("demo", "--adapter", "dora"), "oft"),
        (("run", "demo", "--set", "executor=kubernetes"), "ORBIT_SITE"),
        (("run", "demo", "--store", "s3://key:hunter2@bucket"), "AWS_ACCESS_KEY_ID"),
        (("run", "demo", "--set", "model={kind: local, path: /no/model}"), "/no/model"),
        (("pretrain", "demo", "--set", "model={kind: local, path: .}"), "one of this recipe's steps"),
        (("rollouts", "abc"), "no"),
        (("rollouts", "abc", "--group", "1"), "--step N"),
    ],
)
def test_mistakes_end_with_42_and_a_short_text(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    ran = orbit(*arguments, cwd=tmp_path)
    assert ran.returncode == 42, ran.stderr
    assert expected in ran.stderr and "Traceback" not in ran.stderr and "hunter2" not in ran.stderr
    assert len(ran.stderr.splitlines()) < 20


def test_overrides_are_yaml_and_win_over_the_demos_options() -> None:
    assert parse_set(["a.b=3", "c=[1, 2]", "d=null", "e=x=y"]) == {"a.b": 3, "c": [1, 2], "d": None, "e": "x=y"}
    recipe = demo_recipe("nvfp4", "lora", 5, None, ["algorithm.optimizer.learning_rate=1e-2"])
    assert (recipe.precision.format, recipe.precision.group, recipe.seed) == ("nvfp4", 16, 5)
    assert recipe.adapter == LoRA(rank=8, alpha=16) and recipe.algorithm.optimizer.learning_rate == 1e-2
    assert demo_recipe(None, "lora", None, None, []).algorithm.optimizer.learning_rate == 3e-3
    assert demo_recipe(None, None, None, None, []) == load_recipe("demo")
    with pytest.raises(InputError):
        load_recipe("no-such-recipe")


def test_the_demo_on_a_gpu_differs_in_its_engines_alone() -> None:
    from orbit_core.pipeline import plan

    there, here = (demo_recipe(None, None, None, device, []) for device in ("cuda", None))
    assert (there.engines.device, there.engines.compute_dtype) == ("cuda", "bfloat16")
    assert there.model_copy(update={"engines": here.engines}) == here
    assert demo_recipe(None, None, None, "cpu", []) == here
    assert demo_recipe(None, None, None, "cuda", ["engines.compute_dtype=float32"]).engines.compute_dtype == "float32"
    same = {name for name, spec in plan(there, "s").items() if spec.digest == plan(here, "s")[name].digest}
    assert same == {"data", "pretrain", "quantize", "convert"}  # one base for both


def test_plain_progress_is_a_few_lines() -> None:
    """Ten thousand events of a step make two lines: what it was doing and how it ended."""
    written = StringIO()
    with live_view(["train"], Console(file=written)) as view:
        view("train", {"orbit": "started"})
        for done in range(10_000):
            view("train", {"orbit": "progress", "done": done, "total": 10_000, "message": "", "reward": 0.5})
        view("train", {"orbit": "finished", "seconds": 61.0, "reused": False, "facts": {"reward_last": 0.987654}})
    assert written.getvalue().splitlines() == ["✓ train        61.0 s  reward last 0.988"]


def test_the_terminal_view_shows_all_steps_and_survives_every_event() -> None:
    written = StringIO()
    with live_view(["data", "train"], Console(file=written, force_terminal=True, width=150)) as view:
        view("data", {"orbit": "started"})
        view("data", {"orbit": "finished", "seconds": 0.1, "reused": True, "facts": {}})
        view("train", {"orbit": "started"})
        view("train", {"orbit": "log", "message": "x"})
        view("train", {"orbit": "progress", "done": 3, "total": 9, "message": "sampling", "reward": 0.25})
        view("train", {"orbit": "finished", "seconds": 125.0, "reused": False, "facts": {}})
    assert all(word in written.getvalue() for word in ("data", "reused", "train", "2 min 5 s"))


def write_step(store_folder: Path, run: str, step: int) -> None:
    """A committed step of two groups of two samples, through the real writer."""
    columns: dict[str, list[Any]] = {field.name: [None] * 4 for field in SCHEMA}
    columns |= {
        "group_index": [0, 0, 1, 1],
        "sample_index": [0, 1, 0, 1],
        "prompt": ["2+2", "2+2", "3+\n3", "3+\n3"],
        "label": ['"4"'] * 2 + ['"6"'] * 2,
        "response": ["4", "5", "[red]6[/red]", "6"],
        "response_token_ids": [[1], [2], [3, 3], [3]],
        "reward": [1.0, 0.0, 1.0, 1.0],
        "advantage": [1.0, -1.0, 0.0, 0.0],
        "trained": [True, True, False, False],
        "finish_reason": ["stop", "stop", "length", "stop"],
    }
    state = StateFile(path="runs/x", sha256="0" * 64)
    commit = Commit(
        run=run,
        step=step,
        rows=4,
        state=state,
        adapter_version=step + 1,
        adapter_digest="ab" * 32,
        metrics={"reward_mean": 0.75},
        previous=None,
    )
    assert open_store(store_folder).put_if_absent(rollouts_path(run, step), encode_step(columns, commit))


def test_rollouts_shows_steps_groups_and_samples(tmp_path: Path) -> None:
    for step in (0, 1):
        write_step(tmp_path / "s", "abc123", step)
    write_step(tmp_path / "s", "other", 0)
    store = ("--store", str(tmp_path / "s"))
    steps = orbit("rollouts", "abc", *store).stdout
    assert [line.split()[:2] for line in steps.splitlines()[1:3]] == [["0", "4"], ["1", "4"]] and "0.75" in steps
    groups = orbit("rollouts", "abc123", *store, "--step", "1").stdout
    assert "0.500" in groups and "1.000" in groups and "3+ 3" in groups and "0/2" in groups
    samples = orbit("rollouts", "abc123", *store, "--step", "1", "--group", "1").stdout
    assert "[red]6[/red]" in samples and "length" in samples and '"6"' in samples
    runs = orbit("rollouts", *store).stdout
    assert [line.split()[:2] for line in runs.splitlines()[1:]] == [["abc123", "2"], ["other", "1"]]
    assert "abc123, other" in orbit("rollouts", "nothing", *store).stderr
    assert orbit("rollouts", "abc123", *store, "--step", "7").returncode == 42
