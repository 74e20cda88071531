"""Where a published adapter comes from: digests of everything that went into it, and of every file that came out.

Made from specs and contents alone: no times, no paths of the machine, so equal runs give equal manifests.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbit_core
from orbit_core.recipe import Recipe
from orbit_core.steps.contract import StepSpec, json_digest
from orbit_core.store.artifacts import code_version
from orbit_core.store.digests import sha256_file

SCHEMA = 1


def make_manifest(
    spec: StepSpec, recipe: Recipe, directory: Path, training: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of what lies in `directory`. `training`: summary.json of train; `evaluation`: evaluation.json."""
    described = recipe.model_dump(mode="json", exclude={"executor", "resources"})
    return {
        "schema_version": SCHEMA,
        "name": recipe.name,
        "code": {"package": "orbit-rl", "version": code_version(), "commit": source_commit()},
        "digests": {
            **{name: ref.digest for name, ref in sorted(spec.inputs.items())},
            "recipe": json_digest(described),
            "adapter": evaluation["adapter_digest"],
        },
        "recipe": described,
        "training": {name: value for name, value in training.items() if name != "seconds"},
        "evaluation": dict(evaluation),
        "files": {
            str(path.relative_to(directory)): sha256_file(path)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        },
    }


def source_commit() -> str | None:
    """The commit of the source tree that this package is run from; None for an installed package.

    A tree with changes that are not committed is marked `+dirty`.
    """
    house = Path(orbit_core.__file__).resolve().parents[1]
    if not (house / ".git").exists():
        return None
    try:
        commit = _git(house, "rev-parse", "HEAD")
        changed = _git(house, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git here, or no commit yet: the version still names the code
    return f"{commit}+dirty" if changed else commit


def _git(house: Path, *arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(house), *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip()
