"""Play scenarios many times and count.

    python tests/k8s/soak.py --times 20 --out tests/k8s/soak.json [--only killed --only evicted] [--add]

Prints a line per trial; after each one writes {"scenario": {"promise", "trials", "kept", "seconds", "broken"}}, seconds
and broken promises as lists. `--add` counts on from what the file holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")]

from lanes import ALL, DEPLOYED, Outcome, outcomes  # noqa: E402
from scenarios import SCENARIOS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", action="append", default=[], choices=ALL)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true")
    arguments = parser.parse_args()
    before = json.loads(arguments.out.read_text()) if arguments.add else {}
    found: list[Outcome] = []
    for outcome in outcomes(arguments.only or ALL, arguments.times):
        found.append(outcome)
        print(f"{len(found):4} {outcome.name:24} {outcome.seconds:6.1f} s  {outcome.broken or 'kept'}", flush=True)
        if arguments.out:
            arguments.out.write_text(as_text(summary(found, before)))
    return 0 if len(found) and not any(outcome.broken for outcome in found) else 1


def summary(found: list[Outcome], before: dict[str, Any]) -> dict[str, Any]:
    rows = {name: _of([each for each in found if each.name == name], name, before.get(name, {})) for name in ALL}
    return {name: row for name, row in rows.items() if row["trials"]}


def as_text(rows: dict[str, Any]) -> str:
    """JSON with a scenario a line."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n}\n"


def _of(trials: list[Outcome], name: str, before: dict[str, Any]) -> dict[str, Any]:
    broken = [each.broken.strip().splitlines()[-1] for each in trials if each.broken]
    return {
        "promise": ({**SCENARIOS, **DEPLOYED}[name].__doc__ or "").strip(),
        "trials": before.get("trials", 0) + len(trials),
        "kept": before.get("kept", 0) + len(trials) - len(broken),
        "seconds": before.get("seconds", []) + [round(each.seconds, 1) for each in trials],
        "broken": before.get("broken", []) + broken,
    }


if __name__ == "__main__":
    sys.exit(main())
