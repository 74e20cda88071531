"""Resources: what a step asks of its node when the recipe does not say; `orbit k8s render` shows it all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.options import RECIPES, load_recipe
from k8s.sizing import resources_of
from orbit_core.errors import InputError
from orbit_core.pipeline import VERSIONS, plan
from orbit_core.recipe import Recipe, Resources
from orbit_core.steps.contract import StepSpec

NODE = {"trainer": "megatron", "rollout": "sglang", "device": "cuda"}


def recipe_of(**fields: Any) -> Recipe:
    return Recipe.parse({"model": {"kind": "pretrain"}, "data": {"kind": "reasoning_gym"}, **fields})


def gpus(recipe: Recipe) -> dict[str, int]:
    return {step: resources_of(recipe, step).gpus for step in VERSIONS if resources_of(recipe, step).gpus}


def test_the_recipe_has_the_last_word() -> None:
    wanted = Resources(gpus=2, cpus=3, memory_gib=50)
    recipe = recipe_of(engines=NODE, resources={"train": wanted.model_dump()})
    assert resources_of(recipe, "train") == wanted


def test_on_cpus_every_step_is_small_and_has_the_threads_of_its_engines() -> None:
    recipe = recipe_of(engines={"threads": 6})
    assert gpus(recipe) == {}
    assert {step: resources_of(recipe, step).cpus for step in ("data", "train")} == {"data": 2, "train": 6}
    assert all(resources_of(recipe, step).memory_gib == 8 for step in VERSIONS)


def test_embedded_engines_on_a_device_get_one_gpu_or_as_many_as_its_number_needs() -> None:
    assert gpus(recipe_of(engines={"device": "cuda"})) == {"preflight": 1, "train": 1, "evaluate": 1}
    assert gpus(recipe_of(engines={"device": "cuda:2"})) == {"preflight": 3, "train": 3, "evaluate": 3}


@pytest.mark.parametrize("engines", [{"trainer": "megatron"}, {"rollout": "sglang"}, NODE])
def test_megatron_and_sglang_get_a_whole_node_with_shared_memory(engines: dict[str, str]) -> None:
    recipe = recipe_of(engines={"device": "cuda", **engines})
    assert gpus(recipe) == {"preflight": 8, "train": 8, "evaluate": 8}
    train = resources_of(recipe, "train")
    assert (train.shm_gib, train.memory_gib, train.grace_seconds) == (256, 1800, 600)
    assert resources_of(recipe, "quantize").scratch_gib == 4096  # the base passes through it
    assert resources_of(recipe, "report") == Resources()


def test_a_step_on_a_gpu_without_one_is_refused() -> None:
    recipe = recipe_of(engines={"device": "cuda"}, resources={"train": {"gpus": 0}})
    with pytest.raises(InputError, match="at least 1 GPU"):
        resources_of(recipe, "train")
    with pytest.raises(InputError, match="one of data, pretrain"):
        resources_of(recipe, "trian")


def test_resources_of_an_unknown_step_are_refused_at_the_door_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"unknown step 'trian'; did you mean 'train'"):
        recipe_of(resources={"trian": {"gpus": 8}})
    with pytest.raises(InputError, match=r"known steps: data, pretrain"):
        recipe_of(resources={"xyz": {"gpus": 8}})


def test_shared_memory_is_part_of_memory() -> None:
    with pytest.raises(InputError, match="shm_gib counts against memory_gib"):
        recipe_of(resources={"train": {"memory_gib": 64, "shm_gib": 64}})


# orbit k8s render


def orbit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KUBE", "ORBIT", "AWS"))}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**environment, "HOME": str(cwd), "COLUMNS": "150"}
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    file = tmp_path / "site.yaml"
    file.write_text("images: {cpu: orbit-cpu, gpu: orbit-node}\nstore: s3://bucket/of-the-site\n")
    return file


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_render_shows_every_job_of_a_recipe_in_order_without_cluster_or_store(
    name: str, site: Path, tmp_path: Path
) -> None:
    shown = orbit("k8s", "render", name, "--site", str(site), "--store", "s3://not-there/runs", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    jobs = list(yaml.safe_load_all(shown.stdout))
    specs = plan(load_recipe(name), "s3://not-there/runs")
    assert [job["metadata"]["labels"]["orbit/step"] for job in jobs] == list(specs)
    assert [job["metadata"]["annotations"]["orbit/digest"] for job in jobs] == [s.digest for s in specs.values()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site.yaml"]


def test_render_takes_the_sites_store_and_the_recipes_overrides(site: Path, tmp_path: Path) -> None:
    override = ("--set", "resources.train.gpus=8")
    shown = orbit("k8s", "render", "demo", "--site", str(site), *override, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    train = next(d for d in yaml.safe_load_all(shown.stdout) if d["metadata"]["labels"]["orbit/step"] == "train")
    assert train["metadata"]["annotations"]["orbit/store"] == "s3://bucket/of-the-site"
    [container] = train["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_render_of_one_steps_spec_is_what_the_step_reads(site: Path, tmp_path: Path) -> None:
    shown = orbit("k8s", "render", "demo", "--site", str(site), "--spec", "train", cwd=tmp_path)
    assert StepSpec.model_validate_json(shown.stdout) == plan(load_recipe("demo"), "s3://bucket/of-the-site")["train"]
    unknown = orbit("k8s", "render", "demo", "--site", str(site), "--spec", "trian", cwd=tmp_path)
    assert unknown.returncode == 42 and "one of this recipe's steps" in unknown.stderr


def test_render_without_a_site_or_a_store_that_pods_see_says_what_to_do(site: Path, tmp_path: Path) -> None:
    nowhere = orbit("k8s", "render", "demo", "--store", "s3://b/p", "--site", str(tmp_path / "none.yaml"), cwd=tmp_path)
    assert nowhere.returncode == 42 and "ORBIT_SITE" in nowhere.stderr
    unseen = orbit("k8s", "render", "demo", "--store", ".orbit", "--site", str(site), cwd=tmp_path)
    assert unseen.returncode == 42 and "mounts" in unseen.stderr and unseen.stdout == ""
