"""Every refusal in the houses that read a person's input is written with its next step."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "orbit_core"
READ_OUTSIDE = ("adapters", "checkpoints", "data", "homework", "modeling", "rl", "steps", "trainers", "rollout")
FILES = [file for folder in READ_OUTSIDE for file in sorted((CORE / folder).rglob("*.py"))]


@pytest.mark.parametrize(
    "file", [*FILES, CORE / "recipe.py", CORE / "command.py", CORE / "secrets.py"], ids=lambda file: file.stem
)
def test_an_input_error_says_what_to_do(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("InputError", "GateError"):
            parts = len(node.args) + len([keyword for keyword in node.keywords if keyword.arg == "fix"])
            assert parts >= 4, f"{file}:{node.lineno} {ast.unparse(node)}"
