"""At the command itself: exit code 42, the four parts of a refusal on stderr, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from doors import World

from orbit_core.recipe import Recipe
from orbit_core.store import open_store
from orbit_core.store.rollouts import SCHEMA, Commit, StateFile, encode_step, rollouts_path


def orbit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def refused(ran: subprocess.CompletedProcess[str], *words: str) -> None:
    assert ran.returncode == 42, ran.stderr
    assert "Traceback" not in ran.stderr
    assert all(word in ran.stderr for word in words), ran.stderr


@pytest.fixture
def recipe(world: World, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(world.recipe().model_dump(mode="json", exclude_none=True)))
    return file


def test_a_damaged_base_ends_the_command_with_42(world: World, recipe: Path, tmp_path: Path) -> None:
    own = world.with_base(tmp_path / "base", lambda base: (base / "model-00002-of-00008.safetensors").unlink())
    ran = orbit("quantize", str(recipe), "--set", f"model.path={own.base}", cwd=tmp_path)
    refused(ran, "model-00002-of-00008", "expected: a file", "found: nothing there", "what to do: fetch")
    assert open_store(tmp_path / ".orbit").list() == []


@pytest.mark.parametrize(
    "setting",
    [
        "data.path=https://me:hunter2@host/rows.jsonl",
        "data.path=https://host/rows.jsonl?X-Amz-Credential=a&X-Amz-Signature=hunter2",
    ],
)
def test_a_secret_in_a_recipe_is_refused_before_prefect_hears_of_it(recipe: Path, tmp_path: Path, setting: str) -> None:
    ran = orbit("run", str(recipe), "--set", setting, "--verbose", cwd=tmp_path)
    refused(ran, setting.split("=")[0], "expected: no credentials", "what to do: give a plain path")
    assert "hunter2" not in ran.stderr + ran.stdout and not (tmp_path / ".orbit").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algoritm": {"steps": 3}}, ["algoritm", "did you mean 'algorithm'?"]),
        ({"algorithm": {"stepps": 3}}, ["algorithm.stepps", "did you mean 'steps'?"]),
        ({"adapter": {"kind": "oft", "blocksize": 16}}, ["blocksize", "did you mean 'block_size'?"]),
        ({"data": {"kind": "fil", "path": "x"}}, ["data", "'file'", "fil"]),
        ({"model": None}, ["model"]),
        ({1: 2}, ["1", "strings"]),
        ({"seed": "x" * 10_000}, ["seed", "..."]),
    ],
    ids=["section", "field", "field of a kind", "kind", "nothing", "a number for a name", "endless value"],
)
def test_a_field_that_no_recipe_has_is_refused_with_the_nearest_name(
    world: World, change: dict[Any, Any], words: list[str], tmp_path: Path
) -> None:
    content = {**world.recipe().model_dump(mode="json", exclude_none=True), **change}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(Exception) as caught:
        Recipe.load(tmp_path / "recipe.yaml")
    assert getattr(caught.value, "exit_code", 1) == 42, repr(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value)) < 1000


def committed(store: Path, run: str, **fields: Any) -> Path:
    commit = Commit(run=run, step=0, rows=0, state=StateFile(path="s", sha256="0" * 64), adapter_version=1,
                    adapter_digest="a", metrics={}, previous=None, **fields)  # fmt: skip
    path = rollouts_path(run, 0)
    open_store(store).put(path, encode_step({name: [] for name in SCHEMA.names}, commit))
    return store / path


def test_rollouts_of_a_later_schema_are_refused(tmp_path: Path) -> None:
    committed(tmp_path / "store", "later", schema_version=99)
    ran = orbit("rollouts", "later", "--store", "store", cwd=tmp_path)
    refused(ran, "expected: schema version 1", "found: schema version 99", "what to do: this Orbit reads")


def test_rollouts_that_are_damaged_are_refused(tmp_path: Path) -> None:
    from doors import checked

    from orbit_core.errors import InputError
    from orbit_core.store.rollouts import RolloutReader

    file = committed(tmp_path / "store", "run")
    whole = file.read_bytes()
    damaged = [
        whole[:-9],
        b"",
        b"PAR1",
        whole.replace(b"orbit.commit", b"orbit.kommit"),
        whole.replace(b'"rows"', b'"rowz"'),
    ]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(InputError) as caught:
            RolloutReader(open_store(tmp_path / "store"), "run").rows(0)
        checked(caught.value)
