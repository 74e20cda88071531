"""The programs of a real control plane: given by KUBEBUILDER_ASSETS, else built once from Go modules and kept.

What is built is a function of the modules' go.mod, go.sum and tools.go, so it is kept in the user's cache under their
digest. `python tests/cluster/binaries.py` builds ahead of the tests and prints the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from orbit_core.errors import InputError
from orbit_core.store.digests import cache_directory

MODULES = Path(__file__).parent / "go"
KUBERNETES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
PROGRAMS = (*KUBERNETES, "etcd")
VERSION = "v1.37.2"


def assets() -> Path:
    """The folder with the five programs. InputError where one is missing that the environment promised, or no `go`."""
    given = os.environ.get("KUBEBUILDER_ASSETS")
    if given:
        missing = [name for name in PROGRAMS if not os.access(Path(given) / name, os.X_OK)]
        if missing:
            raise InputError(
                f"KUBEBUILDER_ASSETS={given}",
                f"the programs {', '.join(PROGRAMS)}",
                f"no {', '.join(missing)}",
                "unset it, so that they are built, or name a folder that has all of them",
            )
        return Path(given)
    kept = cached()
    return kept if kept.is_dir() else _built_once(kept)


def why_not() -> str | None:
    """One line that says why there can be no control plane here, else None."""
    if sys.platform != "linux":
        return f"the test cluster needs Linux, and this is {sys.platform}"
    if os.environ.get("KUBEBUILDER_ASSETS") or cached().is_dir() or shutil.which("go"):
        return None
    return "no `go` to build a Kubernetes control plane with, and no KUBEBUILDER_ASSETS"


def cached() -> Path:
    """Where they are kept. Complete if it exists."""
    content = hashlib.sha256()
    for file in sorted(path for path in MODULES.rglob("*") if path.is_file()):
        content.update(f"{file.relative_to(MODULES)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return cache_directory() / "control-plane" / content.hexdigest()[:16]


def _built_once(kept: Path) -> Path:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits here and then finds what the first has built
        if not kept.is_dir():
            with tempfile.TemporaryDirectory(dir=kept.parent, prefix="building-") as folder:
                _build(Path(folder))
                Path(folder).chmod(0o755)
                os.rename(folder, kept)
                os.mkdir(folder)  # what the context manager removes
    return kept


def _build(folder: Path) -> None:
    if shutil.which("go") is None:
        raise InputError(
            "control plane for tests", "Go, to build it", "no `go` in PATH", "install Go or set KUBEBUILDER_ASSETS"
        )
    print(f"Building a Kubernetes control plane into {folder}: 6 to 10 minutes, once.", file=sys.stderr, flush=True)
    version = "k8s.io/component-base/version."
    _, major, minor, _ = VERSION.replace("v", ".").split(".")
    values = {"gitVersion": VERSION, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    flags = " ".join(["-s", "-w", *(f"-X {version}{name}={value}" for name, value in values.items())])
    _go_build("etcd", folder / "etcd", "-s -w", ["go.etcd.io/etcd/server/v3"])
    _go_build("kubernetes", folder, flags, [f"k8s.io/kubernetes/cmd/{name}" for name in KUBERNETES])


def _go_build(module: str, output: Path, flags: str, packages: list[str]) -> None:
    target = f"{output}/" if output.is_dir() else str(output)
    command = ["go", "build", "-trimpath", "-ldflags", flags, "-o", target, *packages]
    subprocess.run(command, cwd=MODULES / module, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    print(assets())
