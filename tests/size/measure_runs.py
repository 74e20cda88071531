"""Seconds beside the counts of test_long_runs.py: a run of 10,000 steps and 5 million rows, made, resumed and read.

    nice -n 19 python tests/size/measure_runs.py --steps 10000 --rows 500 --work /some/empty/folder

Every figure stands beside the same at a short run (`--early` steps), and beside what the machine itself takes: writing
the bytes of a commit plainly with fsync, reading the bytes of all files plainly. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "kernels")]

import duckdb  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from counted import CountedStore, folder_size  # noqa: E402
from long_run import RUN, make_run, no_fsync, result_of  # noqa: E402

from orbit_core.report.curves import chart_cards  # noqa: E402
from orbit_core.rl import recorder as recording  # noqa: E402
from orbit_core.rl.recorder import Recorder  # noqa: E402
from orbit_core.store import open_store  # noqa: E402
from orbit_core.store.rollouts import SCHEMA, RolloutReader  # noqa: E402

REPEATS = 20
SUMS = "select step_index, avg(reward), count(*) from read_parquet({}) group by step_index"
LOOKS = {  # each in a process of its own, so that memory and imports are its own
    "rollouts RUN": ["-m", "flows.cli", "rollouts", RUN],
    "rollouts RUN --last 0": ["-m", "flows.cli", "rollouts", RUN, "--last", "0"],
    "rollouts RUN --step": ["-m", "flows.cli", "rollouts", RUN, "--step", "{step}"],
    "rollouts RUN --step --group": ["-m", "flows.cli", "rollouts", RUN, "--step", "{step}", "--group", "1"],
    "help, for the time of starting": ["-m", "flows.cli", "rollouts", "--help"],
}
COMPACT = ["-m", "flows.cli", "compact", RUN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--early", type=int, default=10)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder to work in; a run that is there is gone on with"
    )
    parser.add_argument("--parts", default="make,commit,resume,look,compact,scan")
    options = parser.parse_args()
    parts, result = options.parts.split(","), vars(options) | {"work": None, "cpus": os.cpu_count()}
    runs = {"early": options.work / "early", "late": options.work / "late"}
    with template_rows(options.rows):
        if "make" in parts:
            result["make_seconds"] = make(runs, options.early, options.steps, options.rows)
        if "commit" in parts:
            result["commit"] = commits(runs, options.rows)
    if "resume" in parts:
        result["resume"] = resumptions(runs)
    if "look" in parts:
        result["look"] = {name: {run: look(runs[run], command) for run in runs} for name, command in LOOKS.items()}
        result["curves"] = {run: curves(runs[run]) for run in runs}
    if "compact" in parts:
        result["compact"] = look(runs["late"], COMPACT)
    if "scan" in parts:
        result["scan"] = scans(runs["late"])
    print(json.dumps(result))


def make(runs: dict[str, Path], early: int, late: int, rows: int) -> float:
    with no_fsync():
        make_run(open_store(runs["early"]), early, rows)
        took = seconds(lambda: make_run(open_store(runs["late"]), late, rows))
    os.sync()  # what is still to be written would be waited for by the first commit that is timed
    return round(took, 1)


@contextlib.contextmanager
def template_rows(rows: int) -> Iterator[None]:
    """Columns made once and used for every step, its number aside: five million Python objects are not the subject."""
    random, real = np.random.default_rng(0), recording.columns_of
    plain = {name: pa.array(values) for name, values in real(result_of(0, rows).samples, RUN, "base", "a", 0.5).items()}
    lengths = np.concatenate([[0], np.cumsum(random.integers(4, 12, rows))]).astype(np.int32)
    tokens = pa.array(random.integers(0, 32_000, lengths[-1], dtype=np.int32))
    logprobs = pa.array(-random.random(lengths[-1], dtype=np.float32))
    plain["response_token_ids"] = pa.ListArray.from_arrays(lengths, tokens)
    for name in ("rollout_logprobs", "trainer_logprobs"):
        plain[name] = pa.ListArray.from_arrays(lengths, logprobs)
    columns = {name: plain[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names}

    def columns_of(samples: Any, *rest: Any) -> dict[str, pa.Array]:
        return columns | {"step_index": pa.array([samples[0].key.step] * rows, pa.int32())}

    recording.columns_of = columns_of
    try:
        yield
    finally:
        recording.columns_of = real


def commits(runs: dict[str, Path], rows: int) -> dict[str, Any]:
    """Commits of the real recorder, durable, of both runs by turns; and the same bytes written plainly after each."""
    stores = {run: CountedStore(open_store(folder)) for run, folder in runs.items()}
    recorders = {run: Recorder(store, RUN, base_digest="base") for run, store in stores.items()}
    last = {run: recorder.last() for run, recorder in recorders.items()}
    took: dict[str, list[float]] = {run: [] for run in (*runs, "plain_write")}
    cpu: dict[str, list[float]] = {run: [] for run in runs}
    found: dict[str, Any] = {}
    for _ in range(REPEATS):
        for run, store in stores.items():
            made = result_of(last[run].step + 1, rows)
            store.taken()
            start, worked = time.perf_counter(), time.process_time()
            last[run] = recorders[run].commit(made, last[run])
            took[run].append(time.perf_counter() - start)
            cpu[run].append(time.process_time() - worked)
            found[run] = {"step": last[run].step, "asked": store.taken()}
            content = store.read(f"rollouts/run={RUN}/step={last[run].step:06d}/rollouts.parquet")
            file = runs[run].parent / "plain"
            took["plain_write"].append(seconds(lambda file=file, content=content: write_plainly(file, content)))
    figures = {run: found.get(run, {}) | spread(times, cpu.get(run, [])) for run, times in took.items()}
    return figures | {"bytes": len(content)}


def write_plainly(file: Path, content: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    file.unlink()


def resumptions(runs: dict[str, Path]) -> dict[str, Any]:
    """What the loop asks of the store before it goes on, of both runs by turns."""
    took: dict[str, list[float]] = {run: [] for run in runs}
    cpu: dict[str, list[float]] = {run: [] for run in runs}
    asked = {}
    for _ in range(5 * REPEATS):
        for run, folder in runs.items():
            store = CountedStore(open_store(folder))
            recorder = Recorder(store, RUN, base_digest="base")
            start, worked = time.perf_counter(), time.process_time()
            commit = recorder.last()
            recorder.load_state(commit)
            recorder.clean(commit.step)
            recorder.repeat_commits(commit.step)
            took[run].append(time.perf_counter() - start)
            cpu[run].append(time.process_time() - worked)
            asked[run] = store.taken()
    return {run: {"asked": asked[run], **spread(took[run], cpu[run])} for run in runs}


def look(folder: Path, command: list[str]) -> dict[str, float]:
    """Seconds, and largest memory, of a command of `orbit`."""
    middle = len(RolloutReader(open_store(folder), RUN).steps()) // 2
    filled = [word.format(step=middle) for word in command]
    arguments = [sys.executable, *filled, *([] if "--help" in filled else ["--store", str(folder)])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    peak = 0
    with open(folder.parent / "output", "w+b") as output:
        start = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=output, env=environment, cwd=ROOT)
        while process.poll() is None:
            peak = max(peak, largest_memory(process.pid))
            time.sleep(0.01)
        wall = time.perf_counter() - start
        output.seek(0)
        lines = output.read().count(b"\n")
    assert process.returncode == 0, command
    return {"seconds": round(wall, 2), "lines": lines, "peak_megabytes": peak}


def largest_memory(process: int) -> int:
    """MiB so far of a running process; not its ru_maxrss, which begins with the memory of its parent."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return 0


def curves(folder: Path) -> dict[str, float]:
    """All commits, read as `commits()` reads them and, beside it, footer by footer; then every chart of the report."""
    reader = RolloutReader(open_store(folder), RUN)
    metrics: list[dict[str, float]] = []
    by_block = seconds(lambda: metrics.extend(reader.metrics()))
    by_footer = seconds(lambda: [reader.commit(step) for step in reader.steps()])
    greedy = {side: {"greedy": {"accuracy": 0.5}} for side in ("before", "after")}
    cards: list[str] = []
    drawn = seconds(lambda: cards.extend(map(str, chart_cards(metrics, greedy, {"max_orthogonality_error": 0.1}))))
    return {
        "commits_seconds": round(by_block, 3),
        "footers_seconds": round(by_footer, 3),
        "charts_seconds": round(drawn, 3),
        "charts_bytes": sum(map(len, cards)),
    }


def scans(folder: Path) -> dict[str, Any]:
    """A person's query over all rows, in DuckDB: over the steps' files, and over those that `files()` names."""
    reader = RolloutReader(open_store(folder), RUN)
    found: dict[str, Any] = {}
    sources = {"steps": [*map(str, sorted(folder.glob("rollouts/*/*/*.parquet")))], "files()": reader.files()}
    for name, paths in sources.items():
        rows: list[Any] = []
        took = seconds(lambda paths=paths, rows=rows: rows.extend(duckdb.sql(SUMS.format(paths)).fetchall()))
        read = seconds(lambda paths=paths: [Path(path).read_bytes() for path in paths])
        size = sum(Path(path).stat().st_size for path in paths)
        found[name] = {
            "seconds": round(took, 2),
            "files": len(paths),
            "bytes": size,
            "rows": sum(row[2] for row in rows),
            "plain_read_seconds": round(read, 2),
        }
    found["store_bytes"] = folder_size(folder)
    return found


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(took: list[float], cpu: list[float]) -> dict[str, float]:
    """Of wall clock, which counts the neighbours of a busy machine, and of CPU time, which does not."""
    lower, median, upper = statistics.quantiles(took, n=4)
    figures = {"quarter_ms": lower, "median_ms": median, "three_quarters_ms": upper}
    if cpu:
        figures["cpu_median_ms"] = statistics.median(cpu)
    return {name: round(value * 1000, 2) for name, value in figures.items()}


if __name__ == "__main__":
    main()
