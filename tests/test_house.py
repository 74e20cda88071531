"""The house: who may enter which room, and what may stand at the door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["orbit_kernels", "orbit_core", "k8s", "tasks", "flows"]  # imports go to the left only
FOLDERS = {"orbit_kernels": "kernels/orbit_kernels"}
TOP_LEVEL = {"flows", "tasks", "orbit_core", "kernels", "k8s", "tests", "pyproject.toml", "README.md", "LICENSE"}


def sources(house: str) -> list[Path]:
    return sorted((ROOT / FOLDERS.get(house, house)).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top names of the packages that a file imports, at module level or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("house", ORDER)
def test_imports_go_one_way(house: str) -> None:
    forbidden = set(ORDER[ORDER.index(house) + 1 :])
    for path in sources(house):
        assert not imported(path) & forbidden, f"{path.relative_to(ROOT)} imports {imported(path) & forbidden}"


def test_core_knows_neither_prefect_nor_kubernetes() -> None:
    for path in sources("orbit_core"):
        assert not imported(path) & {"prefect", "kubernetes"}, path


def test_kernels_know_only_torch_and_triton() -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "orbit_kernels"}
    for path in sources("orbit_kernels"):
        assert not imported(path) - allowed, path


def test_nothing_else_stands_at_the_top_level() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tops = {line.split("/")[0] for line in listed if line and not line.startswith(".")}
    assert tops <= TOP_LEVEL


def test_no_source_file_passes_400_lines() -> None:
    long = {
        str(p.relative_to(ROOT)): n for h in ORDER for p in sources(h) if (n := len(p.read_text().split("\n"))) > 400
    }
    assert not long
