"""Play scenarios many times and count.

    python tests/k8s/soak.py --times 20 --out tests/k8s/soak.json [--only killed --only evicted]

Prints a line per trial; after each one writes {"scenario": {"promise", "trials", "kept", "seconds", "broken"}}, the
seconds being their median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")]

from lanes import ALL, Outcome, outcomes  # noqa: E402
from prefect_scenarios import PREFECT_SCENARIOS  # noqa: E402
from scenarios import SCENARIOS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", action="append", default=[], choices=ALL)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: list[Outcome] = []
    for outcome in outcomes(arguments.only or ALL, arguments.times):
        found.append(outcome)
        print(f"{len(found):4} {outcome.name:24} {outcome.seconds:6.1f} s  {outcome.broken or 'kept'}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(summary(found), indent=2) + "\n")
    return 0 if len(found) and not any(outcome.broken for outcome in found) else 1


def summary(found: list[Outcome]) -> dict[str, Any]:
    return {name: _of([each for each in found if each.name == name], name) for name in ALL if _played(found, name)}


def _played(found: list[Outcome], name: str) -> bool:
    return any(each.name == name for each in found)


def _of(trials: list[Outcome], name: str) -> dict[str, Any]:
    broken = [each.broken.strip().splitlines()[-1] for each in trials if each.broken]
    promise = ({**SCENARIOS, **PREFECT_SCENARIOS}[name].__doc__ or "").strip()
    seconds = round(statistics.median(each.seconds for each in trials), 1)
    return {
        "promise": promise,
        "trials": len(trials),
        "kept": len(trials) - len(broken),
        "seconds": seconds,
        "broken": broken,
    }


if __name__ == "__main__":
    sys.exit(main())
