"""A step: a function from typed inputs to an artifact named by the digest of its inputs.

The digest covers the step's name and version, its parameters and the digests of its inputs; paths, stores, executors
and times are not in it. So every digest of a pipeline is known before anything runs, and running a step again with the
same inputs finds the artifact and returns at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class InputRef(BaseModel):
    """An input: another step's artifact, or something of the person's named by path and content digest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    digest: str
    step: str | None = None  # artifact of this step
    path: str | None = None  # or: external file or directory


class StepSpec(BaseModel):
    """Everything a process or a pod needs to run one step."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: str
    version: int
    params: dict[str, Any]
    inputs: dict[str, InputRef]
    store: str

    @property
    def digest(self) -> str:
        """sha256 hex of (step, version, params, input digests)."""
        identity = {
            "step": self.step,
            "version": self.version,
            "params": self.params,
            "inputs": {name: ref.digest for name, ref in self.inputs.items()},
        }
        return json_digest(identity)

    def ref(self) -> InputRef:
        return InputRef(step=self.step, digest=self.digest)


@dataclass
class StepContext:
    """What a step function sees."""

    spec: StepSpec
    inputs: dict[str, Path]  # each input as a local directory (or file), fetched and verified
    output: Path  # empty directory; published as the artifact when the function returns
    scratch: Path  # node-local, kept between tries of the same spec: for resumable steps
    emit: Callable[
        ..., None
    ]  # emit("progress", done=3, total=60, message=...) or emit("report", name=..., content=...)
    should_stop: Callable[[], bool] = field(default=lambda: False)  # True after SIGTERM, or when the lease is lost
    # Called right before a write that others will see; raises Interrupted when another process may run this step.
    fence: Callable[[], None] = field(default=lambda: None)
    # Beside `output`, so that files can be linked into it, and kept between tries, also on another machine if the store
    # is a folder that both see: what `output` is being made of. Left out: nothing is kept.
    unfinished: Path = None  # type: ignore[assignment]  # filled below
    digests: dict[str, str] = field(default_factory=dict)  # file of `output` -> its sha256, where the step has it

    def __post_init__(self) -> None:
        if self.unfinished is None:
            self.unfinished = self.scratch / "unfinished"

    def progress(self, done: int, total: int, message: str = "", **values: Any) -> None:
        self.emit("progress", done=done, total=total, message=message, **values)


StepFunction = Callable[[StepContext], dict[str, Any]]  # returns facts: JSON kept in the artifact's manifest


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def json_digest(value: Any) -> str:
    """sha256 hex of the value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
