"""The flow's parameters are the recipe's types: the run form on the dashboard, the deployment, the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orbit_core.errors import InputError
from orbit_core.recipe import Recipe

ROOT = Path(__file__).parents[2]
DEMO = yaml.safe_load((ROOT / "flows" / "recipes" / "demo.yaml").read_text())


def test_the_run_form_knows_the_recipes_fields_and_their_limits() -> None:
    from flows.post_train import post_train

    schema = post_train.parameters
    assert schema.required == ["recipe"]
    assert schema.definitions["Precision"]["properties"]["format"]["enum"] == ["int4", "fp8", "nvfp4", "mxfp4", "bf16"]
    assert schema.definitions["Recipe"]["properties"]["adapter"]["discriminator"]["propertyName"] == "kind"
    assert "optimiser updates" in schema.definitions["Algorithm"]["properties"]["updates_per_step"]["description"]


def test_parameters_from_json_become_a_recipe_and_mistakes_are_refused() -> None:
    from prefect.exceptions import ParameterTypeError

    from flows.post_train import post_train

    validated = post_train.validate_parameters({"recipe": DEMO, "store": "s3://bucket/x"})
    assert validated["recipe"] == Recipe.parse(DEMO)
    wrong: dict[str, Any] = {**DEMO, "precision": {"format": "int3"}}
    with pytest.raises(ParameterTypeError, match="int4"):
        post_train.validate_parameters({"recipe": wrong})


def test_the_deployment_runs_the_demos_recipe() -> None:
    deployment = yaml.safe_load((ROOT / "k8s" / "prefect.yaml").read_text())["deployments"][0]
    assert deployment["entrypoint"] == "flows/post_train.py:post_train"
    assert deployment["parameters"]["recipe"] == DEMO


def test_a_cluster_that_nobody_described_is_refused_before_anything_runs(prefect_api: str, tmp_path: Path) -> None:
    from flows.post_train import post_train

    with pytest.raises(InputError, match="ORBIT_SITE"):
        post_train(Recipe.parse({**DEMO, "executor": "kubernetes"}), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_configured_api_is_used_and_no_server_started(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL

    from flows import server

    monkeypatch.setattr(server, "_start", lambda: pytest.fail("started a second server"))
    server.ensure_server()
    assert PREFECT_API_URL.value() == prefect_api
