"""What a tensor costs in `convert` beside its bytes: a model of many tiny tensors, 8 x 8 each.

    nice -n 19 python tests/size/measure_tensors.py --tensors 70000 --work /some/empty/folder
    nice -n 19 python tests/size/measure_tensors.py --kimi --work /some/empty/folder

The second takes the names and the number of Kimi-K2.6's tensors, through `quantize` (which takes them as they lie) too.
Prints one JSON object. `function_calls` is what CI compares: it is the same at every run, seconds are not.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "checkpoints"), str(ROOT), str(ROOT / "kernels")]

from small_models import config_of, write_model  # noqa: E402

from orbit_core.checkpoints.megatron import to_megatron  # noqa: E402
from orbit_core.steps import quantize  # noqa: E402
from orbit_core.steps.contract import InputRef, StepContext, StepSpec  # noqa: E402
from orbit_core.store.growing import Growing  # noqa: E402


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
    parser.add_argument("--kimi", action="store_true")
    options = parser.parse_args()
    work: Path = options.work
    if options.kimi:
        from kimi import write_kimi

        source, tensors = work / "hf", write_kimi(work / "hf")
        taking = timed(lambda: take(source, work), tensors)
        figures = {"tensors": tensors, "take": taking}
    else:
        source, tensors = tiny_model(work / "hf", options.tensors)
        figures = {"tensors": tensors}
    growing = Growing(work / "unfinished")
    converting = timed(lambda: to_megatron(source, work / "megatron", growing=growing), tensors)
    print(json.dumps({**figures, "convert": converting}))


def take(source: Path, work: Path) -> None:
    """The step `quantize` on a base that is quantised already: every tensor checked, the inventory taken, the files
    written again."""
    params = {"precision": {"format": "int4"}}
    spec = StepSpec(step="quantize", version=1, params=params, inputs={"base": InputRef(digest="0")}, store="")
    (work / "taken").mkdir()
    quantize.run(StepContext(spec, {"base": source}, work / "taken", work / "scratch", lambda *_, **__: None))


def timed(work: Callable[[], object], tensors: int) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_ms_a_tensor": round(wall / tensors * 1000, 3), "cpu_ms_a_tensor": round(cpu / tensors * 1000, 3)}


if __name__ == "__main__":
    main()
