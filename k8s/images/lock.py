"""Lock files of the images: `python k8s/images/lock.py [--upgrade] [NAME ...]`, with uv on the PATH.

Each `locks/NAME.in` becomes `locks/NAME.txt`: every package of the environment, pinned, with the sha256 of its files,
for Linux x86_64 and the Python of the images. The first line holds a digest of what the lock was made from, so that a
test finds, without a network, a lock that was not made again. Pins stay as they are unless `--upgrade` is given. The
files name no package index: whoever builds uses the one that pip and uv are set up with.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LOCKS = Path(__file__).parent / "locks"
PYTHON = "3.12"

# In an order in which a lock comes after those that constrain it. The images have glibc 2.41 (CPU) and 2.39 (node).
# For 2.28 the last three do not resolve: SGLang has wheels from 2.34 up, Bridge's nvidia-resiliency-ext from 2.31 up.
OPTIONS: dict[str, tuple[str, ...]] = {
    "build": ("--python-platform", "x86_64-manylinux_2_28"),
    "orchestrator": ("--python-platform", "x86_64-manylinux_2_28"),
    "cpu": ("--python-platform", "x86_64-manylinux_2_28"),
    "node": ("--python-platform", "x86_64-manylinux_2_28"),
    "sglang": ("--python-platform", "x86_64-manylinux_2_34"),
    "megatron": ("--python-platform", "x86_64-manylinux_2_34", "--excludes", "megatron.excluded"),
    "transformer-engine-torch": ("--python-platform", "x86_64-manylinux_2_34", "--no-deps"),
}
# Only these are built from source, each for want of a wheel. Without the rule the resolver falls back on releases of
# years ago that "fit" because they come as source, and then they do not build.
FROM_SOURCE = {
    "cpu": ("cellpylib", "pycosat", "zss"),  # of reasoning-gym; pycosat is C
    "node": ("cellpylib", "pycosat", "zss"),
    "megatron": ("antlr4-python3-runtime",),  # of hydra-core; pure Python
    "transformer-engine-torch": ("transformer-engine-torch",),  # C++ and CUDA
}
HEADER = "# made from "


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python k8s/images/lock.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(OPTIONS)}; default: all")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the .in files allow")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(OPTIONS):
        parser.error(f"no such lock: {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}")
    for name in [each for each in OPTIONS if each in (options.names or OPTIONS)]:
        print(f"locking {name}", file=sys.stderr, flush=True)
        lock(name, options.upgrade)
    return 0


def lock(name: str, upgrade: bool = False) -> None:
    """Write `locks/NAME.txt`. Raises CalledProcessError with uv's explanation on stderr where nothing fits together."""
    target = LOCKS / f"{name}.txt"
    command = ["uv", "pip", "compile", "--quiet", f"{name}.in", "--output-file", target.name, "--generate-hashes"]
    command += ["--no-header", "--python-version", PYTHON, *options_of(name), *(["--upgrade"] if upgrade else [])]
    subprocess.run(command, cwd=LOCKS, check=True, env={**os.environ, "UV_PYTHON_DOWNLOADS": "never"})
    body = target.read_text(encoding="utf-8")
    target.write_text(f"{HEADER}{inputs_digest(name)} by python k8s/images/lock.py {name}\n{body}", encoding="utf-8")


def options_of(name: str) -> tuple[str, ...]:
    built = [option for package in FROM_SOURCE.get(name, ()) for option in ("--no-binary", package)]
    return (*OPTIONS[name], "--only-binary", ":all:", *built)


def inputs_digest(name: str) -> str:
    """sha256 of the .in file, of every file that it reads (-r, -c, --excludes), and of the options."""
    seen: dict[str, bytes] = {}
    waiting = [f"{name}.in", *(each for each in OPTIONS[name] if each.endswith(".excluded"))]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen[file] = (LOCKS / file).read_bytes()
            words = [line.split() for line in seen[file].decode().splitlines() if line.startswith(("-r ", "-c "))]
            waiting += [word[1] for word in words]
    digest = hashlib.sha256(repr((PYTHON, options_of(name))).encode())
    for file in sorted(seen):
        digest.update(f"\0{file}\0{len(seen[file])}\0".encode() + seen[file])
    return digest.hexdigest()


def recorded_digest(name: str) -> str:
    """What the lock file says it was made from."""
    first = (LOCKS / f"{name}.txt").read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix(HEADER).split(" ", 1)[0] if first.startswith(HEADER) else ""


if __name__ == "__main__":
    sys.exit(main())
