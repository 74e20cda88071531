"""Runs the bandit loop once undisturbed, then once per boundary: killed there by SIGKILL, started again, compared.

Every boundary is a child made by fork, so that torch is imported once. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from bandit import BanditEngine, BanditTrainer, bandit_loop  # noqa: E402
from boundaries import Boundaries, around  # noqa: E402

from orbit_core.store import commits as layout  # noqa: E402
from orbit_core.store import open_store  # noqa: E402
from orbit_core.store.rollouts import TIMING_COLUMNS, RolloutReader  # noqa: E402

torch.set_num_threads(1)
layout.BLOCK = 2  # so that so short a run fills a block, and has its boundaries killed too
CALLS = {
    BanditEngine: ("generate", "stage_adapter", "activate_adapter"),
    BanditTrainer: ("score", "update", "export_adapter", "state", "load_state"),
}


def run(folder: Path, kill_at: int | None) -> list[str]:
    boundaries = Boundaries(kill_at)
    store, trainer, engine = open_store(folder), BanditTrainer(), BanditEngine()
    for name in CALLS[BanditTrainer]:
        around(trainer, name, boundaries.tick, after=False)
    for name in CALLS[BanditEngine]:
        around(engine, name, boundaries.tick, after=False)
    for name in ("put_if_absent", "put", "delete"):
        around(store, name, boundaries.tick)
    os.fsync = lambda descriptor: None  # SIGKILL loses no written page; a power cut is not what is tried here
    for name in ("link", "fsync"):  # inside the store's writes: temporary file made, named, made durable
        around(os, name, boundaries.tick)
    bandit_loop(store, trainer=trainer, engines=[engine]).run()
    return boundaries.passed


def killed_in_child(folder: Path, kill_at: int) -> bool:
    child = os.fork()
    if child == 0:
        run(folder, kill_at)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def outcome(folder: Path) -> dict:
    """Everything that a run leaves behind, but wall clock."""
    store = open_store(folder)
    reader = RolloutReader(store, "bandit")
    commits = list(reader.commits())
    return {
        "files": store.list(),
        "commits": [{**c.model_dump(exclude={"metrics", "previous"}), "metrics": timeless(c.metrics)} for c in commits],
        "rows": [reader.rows(c.step).drop_columns(list(TIMING_COLUMNS)).to_pylist() for c in commits],
    }


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("seconds_")}


def main(folder: Path) -> None:
    link = os.link
    boundaries = run(folder / "whole", None)
    os.link, os.fsync = link, lambda descriptor: None
    expected = outcome(folder / "whole")
    different = []
    for number, name in enumerate(boundaries):
        tried = folder / "tried"
        assert killed_in_child(tried, number), (number, name)
        bandit_loop(open_store(tried)).run()
        if outcome(tried) != expected:
            different.append([number, name])
        shutil.rmtree(tried)
    print(json.dumps({"boundaries": len(boundaries), "kinds": sorted(set(boundaries)), "different": different}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
