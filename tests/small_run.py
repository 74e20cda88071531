"""A whole run in miniature, with the real steps: what the tests of evaluate, publish and report look at.

Made once for all of them: a base of 60 thousand parameters, seven pretraining steps, two steps of RL.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import StepContext, StepSpec

RECIPE: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model": {
        "kind": "pretrain",
        "hidden_size": 64,
        "intermediate_size": 96,
        "layers": 1,
        "heads": 2,
        "key_value_heads": 1,
        "steps": 7,
        "batch_size": 16,
    },
    "adapter": {"kind": "oft", "block_size": 16},
    "data": {
        "kind": "reasoning_gym",
        "dataset": "chain_sum",
        "config": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        "pool": 300,
        "heldout": 24,
    },
    "reward": {"kind": "python", "function": "peoples_rewards:names_a_one"},
    "algorithm": {
        "steps": 2,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "skip_zero_variance": False,
        "sampling": {"max_new_tokens": 12},
        "optimizer": {"learning_rate": 0.02, "warmup_steps": 0},
    },
    "evaluation": {"prompts": 20, "samples": 4, "k": [1, 2, 4]},
    "publication": {"merge": True},
    "engines": {"threads": 1},
}


@dataclass
class SmallRun:
    """Runs steps of a recipe by hand, each in `root/<step>`; `events` is what they emitted."""

    root: Path
    recipe: Recipe
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def specs(self) -> dict[str, StepSpec]:
        return plan(self.recipe, str(self.root / "store"))

    def output(self, step: str) -> Path:
        return self.root / step

    def run(self, *steps: str, into: Path | None = None) -> dict[str, Any]:
        """Runs the steps one after the other; returns the facts of the last."""
        facts: dict[str, Any] = {}
        for step in steps:
            facts = self._run(step, into or self.output(step))
        return facts

    def _run(self, step: str, output: Path) -> dict[str, Any]:
        spec = self.specs[step]
        output.mkdir(parents=True)
        scratch = self.root / "scratch" / step
        scratch.mkdir(parents=True, exist_ok=True)
        inputs = {
            name: Path(ref.path) if ref.path else self.output(ref.step or "") for name, ref in spec.inputs.items()
        }
        context = StepContext(spec, inputs, output, scratch, lambda kind, **values: self.events.append((kind, values)))
        threads = torch.get_num_threads()
        try:
            return dict(importlib.import_module(f"orbit_core.steps.{step}").run(context))
        finally:
            torch.set_num_threads(threads)


def opened_by_transformers(directory: Path) -> torch.nn.Module:
    """A quantised directory as transformers reads it, computing in float32 with the weights that its bytes stand for.

    It is opened in BF16, which is where a dequantised weight is rounded, and decompressed by a first forward pass.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model(torch.tensor([[1]]))
    return torch.nn.Module.float(model)  # transformers' own `float` refuses quantised models


_made: dict[str, SmallRun] = {}


def small_run(root: Path) -> SmallRun:
    """The run up to its report; made in `root` by the first caller, shared by the others. Treat it as read-only."""
    if "run" not in _made:
        run = SmallRun(root, Recipe.parse(RECIPE))
        run.run("data", "pretrain", "quantize", "convert", "preflight", "train", "evaluate", "publish", "report")
        _made["run"] = run
    return _made["run"]
