"""What each step asks of its node when the recipe does not say.

A recipe's own entry under `resources` stands as written. Else: bookkeeping is small; a step that runs engines on one
device gets one GPU; where Megatron or SGLang run, a pod is a whole node of eight GPUs, and the steps that read and
write the base model get room for it. The numbers are for a node of 8 GPUs, 192 cores and 2 TiB.
"""

from __future__ import annotations

from typing import Any

from orbit_core.errors import InputError
from orbit_core.pipeline import VERSIONS
from orbit_core.recipe import Engines, Recipe, Resources

ENGINE_STEPS = ("preflight", "train", "evaluate")  # these have the model in memory
MODEL_STEPS = ("pretrain", "quantize", "convert", "publish")  # these stream its files

NODE = Resources(gpus=8, cpus=180, memory_gib=1800, shm_gib=256, scratch_gib=4096, grace_seconds=600)
NODE_FILES = Resources(cpus=32, memory_gib=256, scratch_gib=4096)
DEVICE = Resources(gpus=1, cpus=16, memory_gib=128, shm_gib=16, scratch_gib=512, grace_seconds=300)
DEVICE_FILES = Resources(cpus=8, memory_gib=64, scratch_gib=512)
SMALL = Resources()


def resources_of(recipe: Recipe, step: str) -> Resources:
    """The recipe's entry for `step`, else defaults that fit its engines.

    Raises InputError for a step that no pipeline has, and for an entry without the GPUs that the engines name.
    """
    if step not in VERSIONS:
        raise InputError(f"step {step!r}", f"one of {', '.join(VERSIONS)}", step)
    resources = recipe.resources.get(step) or _default(recipe.engines, step)
    if step in ENGINE_STEPS:
        check_gpus(step, recipe.engines.device, resources)
    return resources


def check_gpus(step: str, device: str, resources: Resources) -> None:
    """InputError if a step whose engines name `device` (cpu, cuda, cuda:N) would not find it in its pod."""
    kind, _, number = device.partition(":")
    needed = 0 if kind == "cpu" else int(number or 0) + 1
    if resources.gpus < needed:
        raise InputError(
            f"resources of step {step}",
            f"at least {needed} GPU(s), because engines.device is {device}",
            f"gpus: {resources.gpus}",
            f"set resources.{step}.gpus to {needed} or more, or engines.device to cpu",
        )


def device_of(params: dict[str, Any]) -> str:
    """The device that a step's parameters name; `cpu` for a step without engines."""
    engines = params.get("engines")
    return str(engines.get("device", "cpu")) if isinstance(engines, dict) else "cpu"


def _default(engines: Engines, step: str) -> Resources:
    whole_node = engines.trainer == "megatron" or engines.rollout == "sglang"
    if step in ENGINE_STEPS:
        if engines.device == "cpu":
            return SMALL.model_copy(update={"cpus": max(SMALL.cpus, engines.threads)})
        return NODE if whole_node else _with_device(engines.device)
    if step in MODEL_STEPS and engines.device != "cpu":
        return NODE_FILES if whole_node else DEVICE_FILES
    return SMALL


def _with_device(device: str) -> Resources:
    """One GPU, or as many as it takes for `cuda:N` to exist."""
    return DEVICE.model_copy(update={"gpus": int(device.partition(":")[2] or 0) + 1})
