"""Every test that needs a GPU, in one run: the suites of the kernels and what is marked `gpu`, side by side.

    python kernels/bench/gpu_tests.py [OUT.json] [--processes 6]

Exit code 1 if a test failed or was skipped, or none ran. Which ones is in the JSON, beside the commands.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from harness import card

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").glob("*_suite.py"))
WITHIN = "tests/kernels/test_fast_paths.py::test_on_a_gpu_the_kernels_keep_every_promise"  # the same suites once more
COMMANDS = (
    ["-m", "pytest", "-o", "addopts=", "-q", *SUITES],
    ["-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu", "tests/kernels", "tests/engines", "--deselect", WITHIN],
)


def start(command: list[str], report: Path, processes: int) -> subprocess.Popen[bytes]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    together = ["-n", str(processes), "--dist", "worksteal", "-p", "no:cacheprovider", f"--junitxml={report}"]
    return subprocess.Popen(
        [sys.executable, *command, *together], cwd=ROOT, env=environment | {"PYTHONPATH": os.pathsep.join(paths)}
    )


def outcome(report: Path) -> dict[str, Any]:
    """How many passed, and the names of those that did not."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        how = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found[how].append(f"{case.get('classname')}::{case.get('name')}")
    return {"passed": len(found["passed"]), "failed": sorted(found["failed"]), "skipped": sorted(found["skipped"])}


def main() -> int:
    parser = argparse.ArgumentParser()
    default = Path(__file__).parent / "results/gpu_tests.json"
    parser.add_argument("path", nargs="?", type=Path, default=default, help="where the JSON goes")
    parser.add_argument("--processes", type=int, default=6, help="of each of the two commands")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"{number}.xml") for number in range(len(COMMANDS))]
        started = [start(command, report, given.processes) for command, report in zip(COMMANDS, reports, strict=True)]
        for process in started:
            process.wait()
        runs = [
            {"command": " ".join(["python", *command]), **outcome(report)}
            for command, report in zip(COMMANDS, reports, strict=True)
        ]
    given.path.write_text(json.dumps({**card(), "runs": runs}, indent=1) + "\n")
    print(json.dumps(runs, indent=1))
    return 0 if all(run["passed"] and not run["failed"] and not run["skipped"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
