"""The readers of outside bytes under a coverage-guided fuzzer, for as long as one likes.

    python -m pip install atheris          # Linux x86-64, CPython 3.11 to 3.13: not part of the dev extra
    python tests/fuzz/fuzz.py --seconds 3600 --out fuzz.json            # the time is shared by all readers
    python tests/fuzz/fuzz.py --only jsonl --seconds 20 --corpus DIR    # DIR keeps what was found worth keeping
    python tests/fuzz/fuzz.py --only jsonl --reproduce crash-3f2a...    # one input again, with its traceback

A finding is an exception that is not ours, more memory than --rss-mib, or an input that takes longer than 10 s. Each
reader runs in a process of its own, so that one finding ends one reader; its input lies beside the corpus.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]


def main() -> int:
    options = _options()
    if options.reproduce:
        return _reproduce(options.only[0], options.reproduce)
    if options.child:
        _fuzz(options)
    from readers import READERS, samples

    names = options.only or list(READERS)
    corpus = Path(options.corpus or tempfile.mkdtemp(prefix="orbit-fuzz-corpus-")).absolute()
    report: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "readers": {}}
    for name in names:
        folder = corpus / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(samples(name)):
            (folder / f"sample-{number}").write_bytes(content)
        report["readers"][name] = found = _run(options, name, folder)
        print(f"{name:16} {found['executions']:>9} inputs {found['seconds']:>7.0f} s  {found['finding'] or 'clean'}")
    report["findings"] = sum(bool(found["finding"]) for found in report["readers"].values())
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
    print(f"corpus and inputs that failed: {corpus}")
    return int(report["findings"] > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for all readers together")
    parser.add_argument("--only", nargs="+", default=[], help="readers to run (tests/fuzz/readers.py)")
    parser.add_argument("--corpus", help="folder of inputs, one folder a reader; default: a new one")
    parser.add_argument("--out", help="JSON file of what was run and found")
    parser.add_argument("--rss-mib", type=int, default=2048, help="memory of the whole process that is a finding")
    parser.add_argument("--reproduce", type=Path, help="run one input of the reader named by --only")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(options: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """One reader in a process of its own; what it did, and its finding in words ("" if there is none)."""
    from readers import READERS

    seconds = options.seconds / len(options.only or READERS)
    command = [sys.executable, __file__, "--child", "--only", name, "--seconds", str(max(1.0, seconds))]
    command += ["--corpus", str(folder), "--rss-mib", str(options.rss_mib)]
    start = time.monotonic()
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = ran.stderr.splitlines()
    executions = [line for line in lines if line.startswith("stat::number_of_executed_units")]
    said = [line.strip() for line in lines if "Error" in line or line.startswith("==") or "Uncaught" in line]
    if ran.returncode and not said:
        said = lines[-1:]
    return {
        "executions": int(executions[0].split()[-1]) if executions else 0,
        "seconds": round(time.monotonic() - start, 1),
        "finding": "; ".join(said[:3]) if ran.returncode else "",
    }


def _fuzz(options: argparse.Namespace) -> None:
    """In the child: never returns."""
    import atheris

    with atheris.instrument_imports(include=["orbit_core", "orbit_kernels"]):
        import readers
    (name,) = options.only

    def one(content: bytes) -> None:
        readers.read(name, content)

    flags = [f"-max_total_time={int(options.seconds)}", f"-rss_limit_mb={options.rss_mib}", "-timeout=60"]
    flags += ["-max_len=65536", "-print_final_stats=1", f"-artifact_prefix={options.corpus}/../{name}-"]
    atheris.Setup([sys.argv[0], *flags, options.corpus], one)
    atheris.Fuzz()


def _reproduce(name: str, file: Path) -> int:
    from readers import read

    taken = read(name, file.read_bytes())
    print(f"{name}: {'taken' if taken else 'refused in our own words'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
