"""What can be promised of the images without a container runtime: clean files, true locks, nothing missing, no root."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from containerfiles import (
    CONTAINERFILES,
    IMAGES,
    ROOT,
    Containerfile,
    Stage,
    context_sources,
    copied_from,
    is_exec_form,
    pins,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from k8s.images import lock

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = {path.name: Containerfile.read(path) for path in CONTAINERFILES}
IMAGES_BUILT = {stage.name: (file, stage) for file in FILES.values() for stage in file.finals()}
STEP_LOCKS = ("cpu", "node")

images = pytest.mark.parametrize("image", IMAGES_BUILT)
files = pytest.mark.parametrize("name", FILES)


# --- Containerfiles


def test_the_images_are_those_that_a_site_names() -> None:
    assert set(IMAGES_BUILT) == {"orchestrator", "cpu", "node"}


@files
def test_hadolint_and_its_shellcheck_find_nothing(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "--no-color", IMAGES / name], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout


@images
def test_an_image_runs_as_a_numeric_user_that_is_not_root(image: str) -> None:
    """A number: the kubelet cannot tell of a name that it is not root, and `runAsNonRoot` would refuse the pod."""
    file, stage = IMAGES_BUILT[image]
    uid, gid = file.last(stage, "USER").split(":")
    assert uid.isdecimal() and gid.isdecimal() and int(uid) == 10001


@images
def test_signals_reach_the_program(image: str) -> None:
    """Exec form, and an init as process 1 that forwards SIGTERM; a shell there would swallow it."""
    file, stage = IMAGES_BUILT[image]
    assert file.last(stage, "ENTRYPOINT") == '["/usr/bin/tini", "--"]'
    assert is_exec_form(file.last(stage, "ENTRYPOINT")) and is_exec_form(file.last(stage, "CMD"))


@files
def test_base_images_are_pinned_and_can_be_pinned_to_bytes(name: str) -> None:
    file = FILES[name]
    outside = {stage.base for stage in file.stages.values() if stage.base not in file.stages}
    assert len(outside) == 1
    match = re.fullmatch(r"\$\{(\w+)_IMAGE\}\$\{(\w+)_DIGEST\}", outside.pop())
    assert match and match[1] == match[2]
    tag = file.arguments[f"{match[1]}_IMAGE"].partition(":")[2]
    assert re.match(r"\d+\.\d+\.\d+-", tag) and "latest" not in tag
    assert file.arguments[f"{match[1]}_DIGEST"] == ""


@files
def test_nothing_is_fetched_but_packages(name: str) -> None:
    """No ADD, no curl: what enters an image comes from the repository, the distribution or a hashed lock."""
    for stage in FILES[name].stages.values():
        assert not stage.values("ADD")
        for command in stage.values("RUN"):
            assert not re.search(r"\b(curl|wget|git clone)\b|https?://", command)
            for install in re.findall(r"pip (?:install|sync) .*?(?=&&|;|$)", command):
                assert "--require-hashes" in install or ("--no-deps" in install and "/wheel/" in install), install


@files
def test_no_secret_is_built_in(name: str) -> None:
    for stage in FILES[name].stages.values():
        for value in [*stage.values("ENV"), *stage.values("ARG")]:
            names = re.findall(r"(\w+)=", value) or [value]
            assert not [n for n in names if re.search(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|ACCESS_KEY", n)]


@files
def test_what_is_copied_exists_and_enters_the_build_context(name: str) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    stages = FILES[name].stages
    for stage in stages.values():
        assert copied_from(stage) <= set(stages)
        for source in context_sources(stage):
            path = source.rstrip("/")
            assert (ROOT / path).exists(), source
            assert any(path == each or path.startswith(f"{each}/") for each in allowed), f".dockerignore hides {source}"


@files
def test_every_house_is_in_the_images(name: str) -> None:
    copied = {source.rstrip("/") for source in context_sources(FILES[name].stages["code"])}
    houses = {"kernels/orbit_kernels", "orbit_core", "k8s", "tasks", "flows"}
    assert copied == houses | {"pyproject.toml", "README.md", "LICENSE"}


def test_git_history_and_private_files_stay_out_of_the_build_context() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"  # what is not named is not sent
    assert "**/*.env" in lines


@images
def test_labels_say_what_is_inside(image: str) -> None:
    _, stage = IMAGES_BUILT[image]
    labels = " ".join(stage.values("LABEL"))
    for key in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{key}=" in labels
    assert f"VERSION={PROJECT['version']}" in stage.values("ARG")


def test_compilers_are_in_the_node_image_alone() -> None:
    def installed(image: str) -> str:
        file, stage = IMAGES_BUILT[image]
        return " ".join(each.value for each in file.lineage(stage) if each.name == "RUN")

    assert "gcc" in installed("node")  # Triton and SGLang compile when they are first used
    assert not [image for image in ("orchestrator", "cpu") if re.search(r"gcc|g\+\+|-dev\b", installed(image))]


# --- Locks


@pytest.mark.parametrize("name", lock.OPTIONS)
def test_a_lock_was_made_from_what_its_inputs_say_now(name: str) -> None:
    fix = f"python k8s/images/lock.py {name}"
    assert lock.recorded_digest(name) == lock.inputs_digest(name), f"out of date; run: {fix}"


def test_changed_inputs_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in lock.LOCKS.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(lock, "LOCKS", tmp_path)
    before = lock.inputs_digest("node")
    (tmp_path / "orchestrator.in").write_text("prefect==3.8.8\n")  # node -> cpu.txt, not through orchestrator.in
    assert lock.inputs_digest("node") == before
    with (tmp_path / "cpu.txt").open("a") as constraint:
        constraint.write("# another pin\n")
    assert lock.inputs_digest("node") != before


@pytest.mark.parametrize("name", lock.OPTIONS)
def test_every_locked_package_is_pinned_and_hashed(name: str) -> None:
    text = (lock.LOCKS / f"{name}.txt").read_text()
    entries = re.findall(r"^(?![ #])\S.*(?:\n[ ].*)*", text, re.MULTILINE)
    assert len(entries) == len(pins(name)) > 0
    assert not [entry for entry in entries if "--hash=sha256:" not in entry]
    assert not re.search(r"://| @ |^-", text, re.MULTILINE)  # no index, no URL, no option


def test_every_lock_is_used_and_none_is_missing() -> None:
    text = "\n".join(path.read_text() for path in CONTAINERFILES)
    used = set(re.findall(r"/locks/([\w-]+)\.txt", text)) | set(re.findall(r"install \w+ (\w+) ", text))
    assert used == set(lock.OPTIONS) == {path.stem for path in lock.LOCKS.glob("*.txt")}


@pytest.mark.parametrize("name", ["orchestrator", *STEP_LOCKS])
def test_pins_lie_within_the_bounds_of_the_project(name: str) -> None:
    locked = pins(name)
    bounds = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    outside = [f"{r}: {locked[n]}" for n, r in bounds.items() if n in locked and locked[n] not in r.specifier]
    assert not outside


def test_the_same_package_is_the_same_version_in_all_of_orbits_environments() -> None:
    orchestrator, cpu, node = pins("orchestrator"), pins("cpu"), pins("node")
    assert orchestrator.items() <= cpu.items()
    assert {name: node[name] for name in node.keys() & cpu.keys()}.items() <= cpu.items()


def test_the_environments_of_the_node_share_torch_and_cuda() -> None:
    """Equal files are stored once, and one CUDA is compiled against; a second one would be 5 GB more."""
    shared = {
        name: version for name, version in pins("node").items() if name.startswith(("torch", "triton", "nvidia-"))
    }
    assert "torch" in shared and "nvidia-cublas" in shared
    for name in ("sglang", "megatron"):
        assert shared.items() <= pins(name).items()
    compiler = {n: v for n, v in pins("sglang").items() if re.match(r"nvidia-(cuda-|nvvm|nvjitlink)", n)}
    assert {".".join(version.split(".")[:2]) for version in compiler.values()} == {"13.0"}


# --- What Orbit imports is there


def imports(*houses: str) -> set[str]:
    """Top names that the files import anywhere, without the standard library and Orbit itself."""
    names: set[str] = set()
    for path in [p for house in houses for p in (ROOT / house).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"orbit_core", "orbit_kernels", "k8s", "tasks", "flows"}


@pytest.mark.parametrize("name", STEP_LOCKS)
def test_everything_that_a_step_imports_is_locked(name: str) -> None:
    distributions = importlib.metadata.packages_distributions()
    locked = pins(name)
    needed = {module: distributions[module] for module in imports("orbit_core", "kernels/orbit_kernels")}
    missing = [m for m, names in needed.items() if not any(canonicalize_name(each) in locked for each in names)]
    assert not missing


ONLY_WHAT_IS_LOCKED = """
import importlib.metadata, importlib.util, pkgutil, sys
from packaging.utils import canonicalize_name

locked = set(sys.argv[1].split(","))
ours = {"orbit_core", "orbit_kernels", "k8s", "tasks", "flows"}
owners = importlib.metadata.packages_distributions()
absent = {m for m, names in owners.items() if m not in ours and not any(canonicalize_name(n) in locked for n in names)}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}: not in the orchestrator's lock", name=name)

for name in [each for each in sys.modules if each.split(".")[0] in absent]:
    del sys.modules[name]
sys.meta_path.insert(0, Absent())
for house in ("flows", "tasks", "k8s"):
    for module in pkgutil.walk_packages(importlib.import_module(house).__path__, f"{house}."):
        importlib.import_module(module.name)
import orbit_core.pipeline, orbit_core.store.s3, orbit_core.store.rollouts
assert "torch" in absent and not absent & set(sys.modules), absent & set(sys.modules)

from flows.cli import app
app(["run", "demo", "--dry-run", "--store", sys.argv[2]])
"""


def test_the_orchestrator_needs_only_what_its_lock_holds(tmp_path: Path) -> None:
    """Every module of flows, tasks and k8s, and a plan of the demo, with all else of this environment made absent."""
    command = [sys.executable, "-c", ONLY_WHAT_IS_LOCKED, ",".join(pins("orchestrator")), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_stages_are_found() -> None:
    """The reader of these tests sees stages, continued lines and lineage; else the promises above would be empty."""
    file = FILES["orchestrator.Containerfile"]
    assert isinstance(file.stages["cpu"], Stage)
    assert [each.name for each in file.lineage(file.stages["cpu"])].count("USER") == 1
    assert "apt-get install" in file.stages["runtime"].values("RUN")[0]
