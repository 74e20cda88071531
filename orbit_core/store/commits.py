"""What the commits of a run are, where they lie, and how a reader gets all of them without opening every step's file.

    rollouts/run=<run>/step=<000012>/rollouts.parquet    the commit of a step, in the footer of its rows
    runs/<run>/state/step-<000012>-<sha16>.safetensors   the trainer's state after a step; only the last ones are kept
    runs/<run>/commits/000000-000099.jsonl               the commits of BLOCK steps once more, one a line

The footers are the truth; a block only repeats them. It is put if absent after the last of its steps is committed, with
bytes that follow from the commits alone, so it does not matter who writes it, how often, or whether somebody dies on
the way: where a block is missing a reader takes the footers and finds the same. Blocks never overlap and are never
rewritten, so what a run of n steps costs to read is n/BLOCK small files and at most BLOCK - 1 footers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from orbit_core.errors import OrbitError
from orbit_core.steps.contract import canonical_json, json_digest

ROLLOUT_SCHEMA = 1
KEEP_STATES = 2  # of the trainer: those after the last steps
BLOCK = 100  # steps; about the square root of a long run. Part of the layout: blocks of another size would overlap


class StateFile(BaseModel):
    model_config = ConfigDict(frozen=True)
    path: str
    sha256: str


class Commit(BaseModel):
    """What a committed step leaves behind for the next one, for reports and for a resumed run."""

    model_config = ConfigDict(frozen=True)
    schema_version: int = ROLLOUT_SCHEMA
    run: str
    step: int
    rows: int
    state: StateFile  # the trainer's state after the step
    adapter_version: int
    adapter_digest: str  # of the adapter after the step
    metrics: dict[str, float]
    previous: str | None  # digest of the previous step's commit

    @property
    def digest(self) -> str:
        return json_digest(self.model_dump(mode="json"))


def rollouts_path(run: str, step: int) -> str:
    return f"rollouts/run={run}/step={step:06d}/rollouts.parquet"


def states_prefix(run: str) -> str:
    return f"runs/{run}/state/step-"


def step_of_state(path: str) -> int | None:
    """The step after which a state was saved, from the state's path; None for another file."""
    match = re.search(r"/state/step-(\d+)-[^/]*$", path)
    return int(match[1]) if match else None


def blocks_over(steps: range) -> list[range]:
    """The blocks that `steps` touch, in order."""
    return [range(first, first + BLOCK) for first in range(steps.start - steps.start % BLOCK, steps.stop, BLOCK)]


def last_whole_block(steps: int) -> range | None:
    """Of a run of which `steps` steps are committed."""
    stop = steps - steps % BLOCK
    return range(stop - BLOCK, stop) if stop else None


def block_name(block: range) -> str:
    """Of a file that holds the whole block."""
    return f"{block.start:06d}-{block.stop - 1:06d}"


def block_path(run: str, block: range) -> str:
    return f"runs/{run}/commits/{block_name(block)}.jsonl"


def compacted_path(run: str, block: range) -> str:
    return f"compacted/run={run}/{block_name(block)}.parquet"


def block_of_name(name: str) -> range | None:
    """The block whose file is called `name`; None for any other file."""
    match = re.match(r"(\d+)-(\d+)\.", name)
    return range(int(match[1]), int(match[2]) + 1) if match else None


def encode_block(commits: Sequence[Commit]) -> bytes:
    return b"".join(canonical_json(commit.model_dump(mode="json")) + b"\n" for commit in commits)


def decode_block(content: bytes, run: str, block: range) -> list[Commit]:
    """The commits of `block`. Raises OrbitError when these are not all commits of these steps of the run."""
    what = f"{block_path(run, block)}\n  expected: the commits of steps {block.start} to {block.stop - 1}"
    fix = "\n  what to do: delete the file; it repeats what the steps' own files hold"
    try:
        commits = [Commit.model_validate_json(line) for line in content.splitlines()]
    except ValidationError as error:
        raise OrbitError(f"{what}\n  found: {error.errors()[0]['msg']}{fix}") from None
    if [(commit.run, commit.step) for commit in commits] != [(run, step) for step in block]:
        raise OrbitError(f"{what}\n  found: {len(commits)} commits of {sorted({c.run for c in commits})}{fix}")
    return commits
