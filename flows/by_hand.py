"""One step of a recipe by hand, and what a run would do without doing it. No Prefect here."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.live import live_view
from orbit_core.errors import InputError
from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe, as_yaml
from orbit_core.steps.contract import StepSpec
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore
from orbit_core.store.checking import ensure_fit
from tasks.executors import executor_for


def run_step_by_hand(step: str, recipe: Recipe, recipe_name: str, store: str) -> Artifact:
    """Run `step` of the recipe; InputError names the step and command whose artifact is missing."""
    specs = plan(recipe, store)
    if step not in specs:
        raise InputError(
            f"step {step}", f"one of this recipe's steps: {', '.join(specs)}", step, "model.kind is not pretrain"
        )
    spec = specs[step]
    artifacts = ArtifactStore(open_store(store))
    _check_inputs(spec, artifacts, recipe_name, store)
    console = Console(stderr=True)
    found = artifacts.find(step, spec.digest)
    if found is None:
        ensure_fit(store)
    with live_view([step], console) as view:
        view(step, {"orbit": "started"})
        seconds = 0.0

        def follow(event: dict[str, Any]) -> None:
            nonlocal seconds
            seconds = event["seconds"] if event["orbit"] == "done" else seconds
            view(step, event)

        artifact = found or executor_for(recipe).run(spec, follow)
        view(step, {"orbit": "finished", "seconds": seconds, "reused": found is not None, "facts": artifact.facts})
    return artifact


def _check_inputs(spec: StepSpec, artifacts: ArtifactStore, recipe_name: str, store: str) -> None:
    needed = [ref for ref in spec.inputs.values() if ref.step and artifacts.find(ref.step, ref.digest) is None]
    if needed:
        where = "" if store == ".orbit" else f" --store {store}"
        raise InputError(
            f"step {spec.step}",
            f"{', '.join(f'{ref.step}/{ref.digest[:16]}' for ref in needed)} in store {store}",
            "nothing there",
            "; ".join(f"orbit {ref.step} {recipe_name}{where}" for ref in needed)
            + f", or all at once: orbit run {recipe_name}{where}",
        )


def show_plan(recipe: Recipe, store: str) -> None:
    """The resolved recipe as YAML and the steps with their digests, on stdout."""
    specs = plan(recipe, store)
    artifacts = ArtifactStore(open_store(store))
    console = Console()
    text = as_yaml(recipe.model_dump(mode="json"))
    console.print(Text(text), soft_wrap=True)
    table = Table("step", "digest", "would be", box=None, pad_edge=False)
    for name, spec in specs.items():
        found = artifacts.find(name, spec.digest) is not None
        table.add_row(name, spec.digest[:16], "reused" if found else "run")
    console.print(table)
