"""What a tensor costs in `convert` beside its bytes: a model of many tiny tensors, 8 x 8 each.

    nice -n 19 python tests/size/measure_tensors.py --tensors 70000 --work /some/empty/folder

Prints one JSON object. `function_calls` is what CI compares: it is the same at every run, seconds are not.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "checkpoints"), str(ROOT), str(ROOT / "kernels")]

from small_models import config_of, write_model  # noqa: E402

from orbit_core.checkpoints.megatron import to_megatron  # noqa: E402


def tiny_model(folder: Path, tensors: int) -> tuple[Path, int]:
    """A mixture of experts of about `tensors` tensors; returns its directory and how many there are."""
    experts = max(1, tensors // 6)
    config = config_of("qwen3_moe", heads=1, groups=1, head_dim=8, inner=8, experts=experts, hidden=8)
    write_model(folder, config | {"moe_intermediate_size": 8})
    return folder, 6 * experts


def function_calls(source: Path, target: Path) -> int:
    """How many calls of functions the conversion takes."""
    profile = cProfile.Profile()
    profile.runcall(to_megatron, source, target)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=5000)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    source, tensors = tiny_model(options.work / "hf", options.tensors)
    wall, cpu = time.perf_counter(), time.process_time()
    to_megatron(source, options.work / "megatron")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    figures = {"wall_ms_a_tensor": round(wall / tensors * 1000, 3), "cpu_ms_a_tensor": round(cpu / tensors * 1000, 3)}
    print(json.dumps({"tensors": tensors, **figures}))


if __name__ == "__main__":
    main()
