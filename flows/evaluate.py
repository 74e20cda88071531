"""The flow that examines an adapter: the recipe's base and held-out prompts, answered with it and without it."""

from __future__ import annotations

from typing import Any

from prefect import flow

from orbit_core.pipeline import plan
from orbit_core.publication.promotions import trained_as
from orbit_core.publication.retraining import evaluation_of
from orbit_core.recipe import Recipe
from orbit_core.store import open_store
from tasks import steps
from tasks.executors import executor_for
from tasks.promotions import run_all

BASE = ("data", "pretrain", "quantize")  # what an evaluation needs


@flow(name="evaluate")
def evaluate(recipe: Recipe, store: str = ".orbit", adapter: str = "promoted") -> dict[str, Any]:
    """Held-out accuracy of a published adapter.

    Args:
        recipe: base, precision, data, reward and evaluation; its name is that of the history of promotions.
        store: folder or s3://bucket/prefix where artifacts and promotions are kept.
        adapter: `promoted`, the number of a promotion, or the digest of a published adapter (8 digits or more).
    """
    executor = executor_for(recipe)
    train = trained_as(open_store(store), recipe.name, adapter)
    specs = plan(recipe, store)
    run_all({step: spec for step, spec in specs.items() if step in BASE}, executor)
    examined = steps.evaluate(evaluation_of(specs["evaluate"], train), executor)
    return {**examined.artifact.facts, "train": train, "path": examined.artifact.url}
