"""From a recipe to the steps of its run, with their digests, before anything runs.

    data -> [pretrain] -> quantize -> convert -> preflight -> train -> evaluate -> publish -> report

Each step's parameters are only the parts of the recipe that its result depends on, so that a changed learning rate
reuses the quantised base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orbit_core.checkpoints.architecture import refuse_uncomputed
from orbit_core.recipe import LocalModel, PromptFile, Recipe
from orbit_core.steps.contract import InputRef, StepSpec
from orbit_core.store.digests import digest_path

VERSIONS = {
    "data": 1,
    "pretrain": 1,
    "quantize": 1,
    "convert": 1,
    "preflight": 1,
    "train": 1,
    "evaluate": 1,
    "publish": 1,
    "report": 1,
    "probe": 1,  # of no recipe: see steps/probe.py
}


def plan(recipe: Recipe, store: str, warm_start: InputRef | None = None) -> dict[str, StepSpec]:
    """Specs of all steps by name, in the order in which they run.

    `warm_start` names the train artifact whose adapter training starts from, in place of the recipe's directory.
    Raises InputError when a file or directory that the recipe names does not exist, or no engine of it could compute
    the model.
    """
    steps: dict[str, StepSpec] = {}

    def add(step: str, params: dict[str, Any], **inputs: InputRef | None) -> InputRef:
        given = {name: ref for name, ref in inputs.items() if ref is not None}
        params = {key: _plain(value) for key, value in params.items()}
        spec = StepSpec(step=step, version=VERSIONS[step], params=params, inputs=given, store=store)
        steps[step] = spec
        return spec.ref()

    start = warm_start or (_external(recipe.warm_start) if recipe.warm_start else None)
    named = _without_folders(recipe, warm_start)
    data = add("data", {"data": named.data, "seed": recipe.seed}, **_prompt_files(recipe))
    if isinstance(recipe.model, LocalModel):
        if "torch" in (recipe.engines.trainer, recipe.engines.rollout):
            refuse_uncomputed(Path(recipe.model.path))
        base = _external(recipe.model.path)
    else:
        base = add("pretrain", {"model": recipe.model, "data": named.data, "seed": recipe.seed}, data=data)
    quantized = add("quantize", {"precision": recipe.precision}, base=base)
    converted = add("convert", {}, quantized=quantized)
    engines = {"adapter": recipe.adapter, "engines": recipe.engines, "seed": recipe.seed}
    limit = recipe.model.context_length if isinstance(recipe.model, LocalModel) else None
    preflight = add(
        "preflight",
        {
            **engines,
            "preflight": recipe.preflight,
            "sampling": recipe.algorithm.sampling,
            **({"context_length": limit} if limit else {}),
        },
        quantized=quantized,
        converted=converted,
        data=data,
    )
    train = add(
        "train",
        {**engines, "algorithm": recipe.algorithm, "reward": recipe.reward},
        quantized=quantized,
        converted=converted,
        data=data,
        preflight=preflight,
        warm_start=start,
    )
    evaluate = add(
        "evaluate",
        {**engines, "evaluation": recipe.evaluation, "reward": recipe.reward, "sampling": recipe.algorithm.sampling},
        quantized=quantized,
        data=data,
        train=train,
    )
    publish = add(
        "publish",
        {"publication": recipe.publication, "recipe": named.model_copy(update={"resources": {}, "executor": "local"})},
        base=base,
        quantized=quantized,
        data=data,
        train=train,
        evaluate=evaluate,
    )
    add("report", {"name": recipe.name}, preflight=preflight, train=train, evaluate=evaluate, publish=publish)
    return steps


def _without_folders(recipe: Recipe, warm_start: InputRef | None) -> Recipe:
    """The recipe as it enters parameters: files by their names alone, because their contents are inputs by digest."""
    changes: dict[str, Any] = {}
    if isinstance(recipe.data, PromptFile):
        heldout = recipe.data.heldout_path
        names = {"path": Path(recipe.data.path).name, "heldout_path": Path(heldout).name if heldout else None}
        changes["data"] = recipe.data.model_copy(update=names)
    if isinstance(recipe.model, LocalModel):
        changes["model"] = recipe.model.model_copy(update={"path": Path(recipe.model.path).name})
    if warm_start:
        changes["warm_start"] = f"{warm_start.step}/{warm_start.digest[:16]}"
    elif recipe.warm_start:
        changes["warm_start"] = Path(recipe.warm_start).name
    return recipe.model_copy(update=changes)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _external(path: str) -> InputRef:
    return InputRef(path=path, digest=digest_path(path))


def _prompt_files(recipe: Recipe) -> dict[str, InputRef]:
    if not isinstance(recipe.data, PromptFile):
        return {}
    files = {"rows": _external(recipe.data.path)}
    if recipe.data.heldout_path:
        files["heldout"] = _external(recipe.data.heldout_path)
    return files
