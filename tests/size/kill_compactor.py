"""Compacts a run in a copy of a store, once per boundary of its writes: killed there by SIGKILL, looked at, finished.

    python tests/size/kill_compactor.py STORE RUN BLOCK WORK

Prints one JSON object: how many boundaries there were, and at which a reader saw anything but every row once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels")]

import pandas  # noqa: E402, F401  pyarrow imports it where it first needs it: once here, not in every child
import pyarrow.dataset  # noqa: E402, F401
from boundaries import Boundaries, around  # noqa: E402

from orbit_core.store import commits as layout  # noqa: E402
from orbit_core.store import open_store  # noqa: E402
from orbit_core.store.compaction import compact  # noqa: E402
from orbit_core.store.rollouts import RolloutReader  # noqa: E402


def run_killed_at(folder: Path, run: str, at: int | None) -> list[str]:
    """Names of the boundaries that a compactor passes: before and after everything that it leaves on the disk."""
    boundaries = Boundaries(at)
    tempfile.tempdir = str(folder / ".tmp")  # what it leaves behind goes with the store
    os.fsync = lambda descriptor: None
    store = open_store(folder)
    for owner, name in ((store, "put_if_absent"), (os, "mkdir"), (os, "link"), (os, "rename")):
        around(owner, name, boundaries.tick)
    compact(store, run)
    return boundaries.passed


def in_child(work: Callable[[], object]) -> object:
    """What `work` returns, done in a child; None if it was killed. Nothing else reads Parquet: a process whose threads
    have begun to is none to fork."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        content = answer.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    return json.loads(content)


def rows_in(path: str | Path) -> list[tuple[int, ...]]:
    table = pq.ParquetFile(path).read(columns=["step_index", "group_index", "sample_index", "reward"])
    return list(zip(*table.to_pydict().values(), strict=True))


def seen(folder: Path, run: str, block: int) -> dict[str, list[tuple[int, ...]]]:
    """The rows that plain readers find: over the steps, over the compacted files, over what `files()` names."""
    sources = {
        "steps": sorted(folder.glob(f"rollouts/run={run}/**/*.parquet")),
        "compacted": sorted(folder.glob("compacted/**/*.parquet")),
        "files": RolloutReader(open_store(folder), run).files(),
    }
    rows = {name: [row for path in paths for row in rows_in(path)] for name, paths in sources.items()}
    found = len(rows["compacted"])
    assert rows["compacted"] == rows["steps"][:found], "of compacted steps every row, and none twice"
    assert found % block == 0, "whole blocks only"
    return {"steps": rows["steps"], "files": rows["files"]}


def main(source: Path, run: str, block: int, work: Path) -> None:
    layout.BLOCK = block
    expected = in_child(lambda: seen(source, run, block))
    whole = copy_of(source, work / "whole")
    boundaries, wrong = in_child(lambda: run_killed_at(whole, run, None)), []
    for number, name in enumerate(boundaries):
        tried = copy_of(source, work / "tried")
        assert in_child(lambda number=number, tried=tried: run_killed_at(tried, run, number)) is None

        def look(tried: Path = tried) -> list[object]:
            killed = seen(tried, run, block)
            compact(open_store(tried), run)
            return [killed, seen(tried, run, block)]

        looks, files = in_child(look), open_store(tried).list("compacted/")
        if looks != [expected, expected] or files != open_store(whole).list("compacted/"):
            wrong.append([number, name])
        shutil.rmtree(tried)
    print(json.dumps({"boundaries": len(boundaries), "kinds": sorted(set(boundaries)), "wrong": wrong}))


def copy_of(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (target / ".tmp").mkdir(exist_ok=True)
    return target


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
