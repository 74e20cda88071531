"""Runs quantize and convert on small models, killed by SIGKILL at each boundary of what they write, and once more.

    python tests/size/kill_converter.py WORK [--every N] [--first N]

Prints one JSON object per step: how many boundaries there were, those at which the second try made other bytes than a
run that nobody killed, and those at which a unit of work (a tensor, a module, a chunk) was done twice.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "checkpoints"), str(ROOT), str(ROOT / "kernels")]

import torch.distributed.checkpoint  # noqa: E402, F401  once here, not in every child
from boundaries import Boundaries, around  # noqa: E402
from kill_compactor import in_child  # noqa: E402
from small_models import PRECISIONS, config_of, write_model  # noqa: E402

from orbit_core.checkpoints import tensorfile, torch_dist  # noqa: E402
from orbit_core.checkpoints.hf import HFCheckpoint  # noqa: E402
from orbit_core.checkpoints.quantizer import quantize_checkpoint  # noqa: E402
from orbit_core.pipeline import VERSIONS  # noqa: E402
from orbit_core.steps import convert, quantize  # noqa: E402
from orbit_core.steps.contract import InputRef, StepSpec  # noqa: E402
from orbit_core.steps.runner import run_step  # noqa: E402
from orbit_core.store.digests import digest_path  # noqa: E402
from orbit_core.store.growing import LEDGER, Growing  # noqa: E402

os.fsync = lambda descriptor: None  # nobody pulls the plug here


def spec_of(step: str, name: str, source: Path, store: Path, **params: Any) -> StepSpec:
    ref = InputRef(digest=digest_path(source), path=str(source))
    return StepSpec(step=step, version=VERSIONS[step], params=params, inputs={name: ref}, store=str(store))


def run(spec: StepSpec) -> dict[str, Any]:
    """Runs the step; returns what it made, and how many units of work it did for it."""
    done: list[str] = []
    record = Growing.record
    around(Growing, "record", done.append, after=False)
    artifact = run_step(spec, lambda *_, **__: None)
    Growing.record = record  # type: ignore[method-assign]
    artifact.verify()
    files = {name: entry.sha256 for name, entry in artifact.manifest.files.items()}
    return {"files": files, "facts": artifact.facts, "units": len(done)}


def run_killed_at(spec: StepSpec, at: int | None) -> dict[str, Any]:
    """The same in a process that dies at boundary `at`; also the names of the boundaries."""
    boundaries = Boundaries(at)
    for owner, name in ((tensorfile.SafetensorsWriter, "append"), (torch_dist, "_write_archive")):
        around(owner, name, boundaries.tick, after=False)
    around(Growing, "_append", boundaries.tick)
    for name in ("rename", "link", "replace"):
        around(os, name, boundaries.tick, after=False)
    return {**run(spec), "boundaries": boundaries.passed}


def recorded(store: Path) -> int:
    """Units that the ledgers in a store's work folder name."""
    lines = [line for ledger in store.glob(f".work/*/unfinished/{LEDGER}") for line in ledger.read_bytes().splitlines()]
    return sum(line.startswith(b'{"unit"') and line.endswith(b"}") for line in lines)


def try_all(tries: slice, step: str, name: str, source: Path, work: Path, **params: Any) -> dict[str, Any]:
    store = work / "store"

    def spec() -> StepSpec:
        return spec_of(step, name, source, store, **params)

    whole = in_child(lambda: run_killed_at(spec(), None))
    assert isinstance(whole, dict)
    shutil.rmtree(store)
    different, repeated = [], []
    for number in range(tries.start, len(whole["boundaries"]), tries.step):
        assert in_child(lambda number=number: run_killed_at(spec(), number)) is None
        before = recorded(store)
        second = run(spec())
        left = any(store.glob(".work/*")) and second["units"] > 0  # an artifact that was there is returned at once
        if (second["files"], second["facts"]) != (whole["files"], whole["facts"]) or left:
            different.append([number, whole["boundaries"][number]])
        if before + second["units"] != whole["units"]:
            repeated.append([number, whole["boundaries"][number], before, second["units"]])
        shutil.rmtree(store)
    kinds = sorted(set(whole["boundaries"]))
    return {"boundaries": len(whole["boundaries"]), "kinds": kinds, "units": whole["units"],
            "files": len(whole["files"]), "different": different, "repeated": repeated}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--every", type=int, default=1, help="only each so manyth boundary")
    parser.add_argument("--first", type=int, default=0, help="boundary to begin with")
    options = parser.parse_args()
    work, tries = options.work, slice(options.first, None, options.every)
    config = config_of("qwen3", heads=2, groups=1, head_dim=32, inner=128, hidden=128)
    base = write_model(work / "base", config | {"num_hidden_layers": 1}, max_shard_bytes=60_000)
    quantized = work / "quantized"
    small = functools.partial(quantize_checkpoint, max_shard_bytes=24_000)
    small(HFCheckpoint(base), quantized, PRECISIONS["int4-32"])
    quantize.quantize_checkpoint = small  # type: ignore[assignment]
    convert.to_megatron = functools.partial(convert.to_megatron, max_file_bytes=24_000)  # type: ignore[assignment]
    int4, fp4 = {"format": "int4"}, {"format": "nvfp4"}
    print(json.dumps({
        "quantize": try_all(tries, "quantize", "base", base, work, precision=fp4),
        "take": try_all(tries, "quantize", "base", quantized, work, precision=int4),
        "convert": try_all(tries, "convert", "quantized", quantized, work),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
