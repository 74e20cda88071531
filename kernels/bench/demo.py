"""The demo on a GPU, recorded: accuracy, learning curve, gap between rollouts and trainer, calls of the fast paths.

    python kernels/bench/demo.py OUT.json [--recipe demo-wide] [--store DIR] [--steps N] [--reference]

Runs the steps of a recipe of flows/recipes on `engines.device` cuda one after the other in this process, as `orbit run`
runs them in processes of their own; what the store has is reused. `--reference` closes the doors of the fast paths, so
that plain torch computes the same on the same card. Calls are counted at those doors, backward passes of rotations and
of Cayley-Neumann apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import card
from orbit_kernels import fast

from flows.options import load_recipe
from orbit_core.pipeline import plan
from orbit_core.steps.runner import run_step
from orbit_core.store import open_store
from orbit_core.store.rollouts import RolloutReader

DOORS = (
    "takes", "takes_grouped", "takes_low_rank", "decodes_adapted", "rotate_supports", "slices_support",
    "cayley_supports",
)  # fmt: skip
COUNTED = (
    "forward", "dgrad", "grouped_product", "rotate", "slices", "decode_adapted", "low_rank", "cayley_neumann",
)  # fmt: skip
PARTS = ("seconds_rollout", "seconds_score", "seconds_update")
CURVE = ("accuracy", "reward_mean", "logprob_gap_mean", "logprob_gap_max", "max_orthogonality_error")


@contextmanager
def counted(calls: Counter[str]) -> Iterator[None]:
    """Count what goes through the fast paths, and the products on the GPU that no fast path takes."""
    kept = {name: getattr(fast, name) for name in COUNTED}
    takes = fast.takes

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            kind = name
            if name == "forward":
                x, packed = arguments[:2]
                way = fast.choose("forward", packed, x.numel() // packed.shape[1])
                kind = way if isinstance(way, str) else "fused"
            calls[kind] += 1
            return kept[name](*arguments)

        return call

    def noticed(*arguments: Any) -> bool:
        taken = bool(takes(*arguments))
        calls["reference product"] += not taken
        return taken

    for name in kept:
        setattr(fast, name, counting(name))
    fast.takes = noticed  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(fast, name, function)
        fast.takes = takes


@contextmanager
def closed(doors: tuple[str, ...]) -> Iterator[None]:
    kept = {name: getattr(fast, name) for name in doors}
    for name in doors:
        setattr(fast, name, lambda *arguments: False)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(fast, name, function)


def run(options: argparse.Namespace) -> dict[str, Any]:
    settings = [f"engines.device={options.device}", "engines.compute_dtype=bfloat16"]
    settings += [f"algorithm.steps={options.steps}"] if options.steps else []
    recipe = load_recipe(options.recipe, settings + options.set)
    specs = plan(recipe, options.store)
    result: dict[str, Any] = {"steps": {}, "calls": {}}
    for name, spec in specs.items():
        if options.until and list(specs).index(name) > list(specs).index(options.until):
            break
        calls: Counter[str] = Counter()
        start = time.perf_counter()
        with counted(calls), closed(DOORS if options.reference else ()):
            artifact = run_step(spec, lambda *event, **values: None)
        result["steps"][name] = {"seconds": round(time.perf_counter() - start, 2), "facts": artifact.facts}
        if calls:
            result["calls"][name] = dict(calls)
        print(name, result["steps"][name]["seconds"], dict(calls), flush=True)
    run_id = specs["train"].digest[:16]
    commits = [commit.metrics for commit in RolloutReader(open_store(options.store), run_id).commits()]
    result["curve"] = {name: [float(f"{m[name]:.4g}") for m in commits if name in m] for name in CURVE}
    late = commits[3:] or commits  # kernels are compiled, allocators warm
    if late:
        result["seconds_per_step"] = {name: statistics.median(m[name] for m in late) for name in PARTS}
        result["seconds_per_step"]["all"] = statistics.median(sum(m[name] for name in PARTS) for m in late)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--store", default=".orbit")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--until", default="", help="the last step of the pipeline to run")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--reference", action="store_true")
    options = parser.parse_args()
    about = card() if torch.cuda.is_available() else {}
    result = {**about, "command": "python kernels/bench/demo.py " + " ".join(sys.argv[1:]), **run(options)}
    Path(options.path).write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
