"""Quantize and convert of a large checkpoint beside a plain copy with digest of the same bytes, by turns.

    nice -n 19 python tests/size/measure_conversions.py --gigabytes 20 --work /some/empty/folder

Random tensors are made on the spot and deleted at the end; twice their size has to be free. Each step is the real
command in a process of its own, and so is the copy, which reads a piece, hashes it and writes it. Nothing of the input
is in memory when either begins, and as much was freed right before: a copy that does not count comes first, because a
virtual machine gives free memory back to its host and pays for every page that it asks for again. Both end when the
bytes are on the disk. A step's seconds are those that its own event names: without the start of Python, with the lock
and the publication.

Prints one JSON object: gigabytes of input a second, `of_copy` (that by the copy's, run right before), processor seconds
a second (2: both cores busy), and the largest anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "checkpoints"), str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from small_models import TOKENIZER, config_of, shapes_of  # noqa: E402

from orbit_core.checkpoints.hf import HFWriter, write_json  # noqa: E402
from orbit_core.checkpoints.tensorfile import TensorMeta, natural_order  # noqa: E402
from orbit_core.pipeline import VERSIONS  # noqa: E402
from orbit_core.steps.contract import InputRef, StepSpec  # noqa: E402
from orbit_core.store.digests import digest_path  # noqa: E402

SETTLED_SECONDS = 2.5  # before the digest of a file is remembered
HOST_SECONDS = 5.0  # in which the host has taken back what was freed
PIECE = 1 << 20  # larger pieces took the copy twice as long: a write of many pages at once costs the kernel more
COPY = f"""
import hashlib, os, sys
for source in sys.argv[2:]:
    digest = hashlib.sha256()
    with open(source, "rb", buffering=0) as old, open(os.path.join(sys.argv[1], os.path.basename(source)), "wb") as new:
        while piece := old.read({PIECE}):
            digest.update(piece)
            new.write(piece)
        new.flush()
        os.fsync(new.fileno())
"""


def random_model(folder: Path, gigabytes: float) -> Path:
    """A dense model of about this size, its largest matrices those of an 8B model where it is large enough."""
    scale = 1 if gigabytes >= 10 else 2
    config = config_of(
        "qwen3", heads=32 // scale, groups=8 // scale, head_dim=128, inner=12288 // scale, hidden=4096 // scale
    )
    vocabulary = 151_936 // scale**3
    layer = 193e6 * 2 / scale**2
    config |= {"num_hidden_layers": max(1, round((gigabytes * 1e9 - 4 * vocabulary * config["hidden_size"]) / layer))}
    shapes = shapes_of(config | {"num_hidden_layers": config["num_hidden_layers"]})
    config["vocab_size"] = vocabulary
    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = (vocabulary, config["hidden_size"])
    pool = torch.randn(1 << 24).mul_(0.02).to(torch.bfloat16)
    plan = {name: TensorMeta(torch.bfloat16, shapes[name]) for name in natural_order(shapes)}
    with HFWriter(folder, plan) as writer:
        for number, (name, meta) in enumerate(plan.items()):
            rows, width = (*meta.shape, 1)[:2]
            step = max(1, len(pool) // 2 // width)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                first = (number * 7919 + start) % (len(pool) - count * width + 1)
                writer.append(name, pool[first : first + count * width].view(count, *meta.shape[1:]))
    write_json(folder / "config.json", config)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


def forget(folder: Path) -> None:
    """Let the memory of the machine forget what lies in `folder`."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def watched(command: list[str]) -> dict[str, Any]:
    """Run a command; its output's lines, seconds, processor seconds and largest anonymous memory."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    lines: list[bytes] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
    reader.start()
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        peak = max(peak, *_anonymous(process.pid), 0)
        time.sleep(0.02)
    reader.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: exit code {process.returncode}")
    seconds = time.monotonic() - began
    return {"lines": lines, "seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "anonymous": peak}


def _anonymous(process: int) -> Iterator[int]:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        text = ""
    yield from (int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:"))
    yield 0


def copied(source: Path, work: Path) -> tuple[float, float]:
    """Seconds and processor seconds of the plain copy."""
    files = sorted(source.glob("*.safetensors"))
    target = work / "copy"
    target.mkdir()
    done = watched([sys.executable, "-c", COPY, str(target), *map(str, files)])
    shutil.rmtree(target)
    forget(source)
    time.sleep(HOST_SECONDS)
    return done["seconds"], done["cpu"]


def stepped(step: str, name: str, source: Path, work: Path, **params: Any) -> tuple[dict[str, Any], Path]:
    """What a step took, beside a copy right before it, and where its output is."""
    copied(source, work)
    copy_seconds, copy_cpu = copied(source, work)
    ref = InputRef(digest=digest_path(source), path=str(source))
    spec = StepSpec(step=step, version=VERSIONS[step], params=params, inputs={name: ref}, store=str(work / "store"))
    file = work / "spec.json"
    file.write_text(spec.model_dump_json())
    done = watched([sys.executable, "-m", "orbit_core", "step", step, "--spec", str(file)])
    events = [json.loads(line) for line in done["lines"]]
    seconds = next(event["seconds"] for event in events if event["orbit"] == "done")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    output = next((work / "store" / "artifacts" / step).glob(f"{spec.digest[:16]}/*"))
    found = {
        "input_gigabytes": size / 1e9,
        "seconds": seconds,
        "gigabytes_a_second": size / seconds / 1e9,
        "copy_gigabytes_a_second": size / copy_seconds / 1e9,
        "of_copy": copy_seconds / seconds,
        "cpu_seconds": done["cpu"],
        "copy_cpu_seconds": copy_cpu,
        "cpu_seconds_a_second": done["cpu"] / done["seconds"],
        "anonymous_megabytes": done["anonymous"] / 1e6,
    }
    return {key: round(value, 3) for key, value in found.items()}, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--formats", default="bf16,fp8,int4,nvfp4,mxfp4")
    options = parser.parse_args()
    work: Path = options.work
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    base = random_model(work / "base", options.gigabytes)
    os.sync()
    time.sleep(SETTLED_SECONDS)
    digest_path(base)  # as planning a run does
    figures: dict[str, Any] = {}
    for name in options.formats.split(","):
        figures[f"quantize {name}"], output = stepped("quantize", "base", base, work, precision={"format": name})
        time.sleep(SETTLED_SECONDS)
        digest_path(output)
        if name in ("bf16", "fp8", "int4"):
            figures[f"convert {name}"], _ = stepped("convert", "quantized", output, work)
        shutil.rmtree(work / "store")
    shutil.rmtree(base)
    shutil.rmtree(work / "cache")
    print(json.dumps({"gigabytes": options.gigabytes, "cpus": len(os.sched_getaffinity(0)), **figures}))


if __name__ == "__main__":
    main()
