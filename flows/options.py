"""From command-line options to a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from orbit_core.errors import InputError
from orbit_core.recipe import Recipe

RECIPES = Path(__file__).parent / "recipes"
# What the demo's task needs with LoRA instead of OFT: a higher learning rate, as its product starts at zero.
DEMO_LORA = {"adapter": {"kind": "lora", "rank": 8, "alpha": 16}, "algorithm.optimizer.learning_rate": 3e-3}


def parse_set(assignments: Sequence[str]) -> dict[str, Any]:
    """`a.b=value` options as a mapping; values are YAML, so numbers, lists and null mean what they look like."""
    overrides = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--set {assignment}", "field.sub=value", assignment, "e.g. --set algorithm.steps=10")
        try:
            overrides[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {name}", "a YAML value", str(error)) from None
    return overrides


def parse_inputs(assignments: Sequence[str]) -> dict[str, str]:
    """`name=path` options as a mapping."""
    inputs = {}
    for assignment in assignments:
        name, equals, path = assignment.partition("=")
        if not equals or not name or not path:
            raise InputError(f"--input {assignment}", "name=path", assignment, "e.g. --input base=/models/Qwen3-4B")
        inputs[name] = path
    return inputs


def load_recipe(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """The recipe at path `name`, or the one of that name that comes with Orbit (`demo`)."""
    path = Path(name)
    ours = RECIPES / f"{name}.yaml"
    if not path.exists() and ours.exists():
        path = ours
    return Recipe.load(path, parse_set(assignments))


def demo_recipe(
    precision: str | None, adapter: str | None, seed: int | None, device: str | None, assignments: Sequence[str]
) -> Recipe:
    """The demo's recipe with the options of `orbit demo` applied; `--set` wins over them.

    On a GPU both engines compute in bfloat16, which is what the fast paths of the kernels take.
    """
    overrides: dict[str, Any] = {}
    if precision is not None:
        overrides["precision"] = {"format": precision}
    if adapter == "lora":
        overrides |= DEMO_LORA
    elif adapter is not None:
        overrides["adapter.kind"] = adapter
    if seed is not None:
        overrides["seed"] = seed
    if device is not None:
        overrides["engines.device"] = device
        if device.startswith("cuda"):
            overrides["engines.compute_dtype"] = "bfloat16"
    return Recipe.load(RECIPES / "demo.yaml", overrides | parse_set(assignments))
