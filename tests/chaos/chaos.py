"""Harm training runs, finish them, and compare each with one that nobody touched.

    python tests/chaos/chaos.py --trials 1000 --seed 0 --out tests/chaos/trials.json [--only killed ...]
        [--boundaries] [--bad-store]

The run is the demo recipe with fewer steps and the judge that starts soonest (`--recipe`, `--set`). Every harm of
harms.py is tried equally often, its instants drawn from `--seed`; with `--boundaries` a run is killed once at each
boundary of each write as well. A trial is kept if nothing but wall clock differs from the undisturbed run: adapter,
metrics, trainer states, rows of all steps, and the names of all files that a reader could find. Prints a line per
trial; exit code 1 if one was not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")]

import yaml  # noqa: E402
from harms import HARMS, at_boundary, counting  # noqa: E402
from places import BadBucket, Folders, bad_bucket  # noqa: E402
from trials import Outcome, Trial, prepare, warm_up  # noqa: E402

from orbit_core.recipe import Recipe  # noqa: E402

SHORT = {"algorithm.steps": 6, "algorithm.prompts_per_step": 8, "reward.kind": "exact_match"}  # a judge soon there


@dataclass(frozen=True)
class Result:
    """`broken`: how it differed, empty if it was kept."""

    harm: str
    what: str
    broken: str


class Bench:
    """An undisturbed run, and others to be compared with it."""

    def __init__(self, recipe: Recipe, place: Folders | BadBucket, prepared: Path, folder: Path) -> None:
        self.recipe, self.place, self.prepared, self.folder = recipe, place, prepared, folder
        warm_up(place)
        trial, marks = self._trial("undisturbed"), folder / "boundaries"
        process = trial.start(counting(marks))
        assert process.wait() == 0, trial.tail()
        self.expected, self.boundaries = trial.outcome(), marks.stat().st_size if marks.exists() else 0
        trial.close()
        trial = self._trial("again")
        trial.finish()
        assert not (difference := self._difference_to(trial.outcome())), f"two undisturbed runs differ: {difference}"
        self.seconds = trial.processes[0].seconds
        trial.close()

    def sampled(self, trials: int, seed: int, names: list[str]) -> Iterator[Result]:
        """So many trials, the harms in turn."""
        for number in range(trials):
            name = names[number % len(names)]
            yield self._tried(name, random.Random(f"{seed} {number}"))

    def enumerated(self) -> Iterator[Result]:
        """A kill at every boundary of every write."""
        for number in range(self.boundaries):
            trial = self._trial("boundary")
            try:
                code = trial.start(at_boundary(number)).wait()
                assert code == -9, f"exit code {code}: the boundary was not reached"
                broken = self._difference(trial)
            except Exception:
                broken = traceback.format_exc()
            trial.close()
            yield Result("boundary", f"{number} of {self.boundaries}", broken)

    def _tried(self, name: str, chance: random.Random) -> Result:
        trial, what = self._trial(name), ""
        try:
            what = HARMS[name](trial, chance, self.seconds)
            broken = self._difference(trial)
        except Exception:
            broken = traceback.format_exc()
        trial.close()
        return Result(name, what, broken)

    def _difference(self, trial: Trial) -> str:
        trial.finish()
        return self._difference_to(trial.outcome())

    def _difference_to(self, found: Outcome) -> str:
        return "; ".join(
            f"{key}: {_difference_of(value, found[key])}" for key, value in self.expected.items() if found[key] != value
        )

    def _trial(self, name: str) -> Trial:
        return Trial.of(self.recipe, self.place, self.prepared, self.folder / name)


def _difference_of(expected: object, found: object) -> str:
    if isinstance(expected, list) and isinstance(found, list):
        missing = [each for each in expected if each not in found]
        added = [each for each in found if each not in expected]
        return f"missing {_short(missing)}, added {_short(added)}"
    return f"expected {_short(expected)}, found {_short(found)}"


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) < 400 else f"{text[:400]}..."


def summary(results: list[Result]) -> dict[str, Any]:
    names = sorted({result.harm for result in results})
    return {
        name: {
            "trials": sum(result.harm == name for result in results),
            "kept": sum(result.harm == name and not result.broken for result in results),
            "broken": [asdict(result) for result in results if result.harm == name and result.broken],
        }
        for name in names
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], choices=[*HARMS])
    parser.add_argument("--boundaries", action="store_true", help="also a kill at every boundary of every write")
    parser.add_argument("--bad-store", action="store_true", help="in a bucket whose server fails, see tests/faults")
    parser.add_argument("--outage", type=float, default=1.0, help="seconds of each outage of that server")
    parser.add_argument("--recipe", default="flows/recipes/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--prepared", type=Path, help="a store whose finished artifacts are taken")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    given = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in arguments.set)}
    recipe = Recipe.load(arguments.recipe, {**SHORT, **given})
    results: list[Result] = []
    with contextlib.ExitStack() as closing:
        folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="orbit-chaos-"))
        prepared = arguments.prepared or Path(folder) / "prepared"
        prepare(recipe, prepared)
        bad = arguments.bad_store
        place = closing.enter_context(bad_bucket(Path(folder), arguments.seed, arguments.outage)) if bad else Folders()
        bench = Bench(recipe, place, prepared, Path(folder))
        print(f"undisturbed: {bench.seconds:.1f} s, {bench.boundaries} boundaries", flush=True)
        for result in _all(bench, arguments):
            results.append(result)
            print(f"{len(results):5} {result.harm:20} {result.what}  {result.broken or 'kept'}", flush=True)
            if arguments.out:
                arguments.out.write_text(_report(arguments, bench, results))
    return 0 if results and not any(result.broken for result in results) else 1


def _all(bench: Bench, arguments: argparse.Namespace) -> Iterator[Result]:
    yield from bench.enumerated() if arguments.boundaries else ()
    yield from bench.sampled(arguments.trials, arguments.seed, arguments.only or [*HARMS])


def _report(arguments: argparse.Namespace, bench: Bench, results: list[Result]) -> str:
    about = {
        "seed": arguments.seed,
        "steps": bench.recipe.algorithm.steps,
        "undisturbed_seconds": round(bench.seconds, 1),
        "adapter": bench.expected["facts"]["adapter_digest"],
    }
    return json.dumps({**about, "harms": summary(results)}, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
