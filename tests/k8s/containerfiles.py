"""A Containerfile as its instructions, and the lock files as pins: what the tests of the images look at."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "k8s" / "images"
CONTAINERFILES = sorted(IMAGES.glob("*.Containerfile"))


@dataclass(frozen=True)
class Instruction:
    name: str  # upper case
    value: str

    @property
    def words(self) -> list[str]:
        return self.value.split()


@dataclass
class Stage:
    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def values(self, name: str) -> list[str]:
        return [each.value for each in self.instructions if each.name == name]


@dataclass
class Containerfile:
    arguments: dict[str, str]  # ARGs before the first FROM
    stages: dict[str, Stage]

    @classmethod
    def read(cls, path: Path) -> Containerfile:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
        logical = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
        arguments: dict[str, str] = {}
        stages: list[Stage] = []
        for line in filter(str.strip, logical):
            name, value = line.strip().split(maxsplit=1)
            if name == "FROM":
                base, _, alias = value.partition(" AS ")
                stages.append(Stage(base.strip(), alias.strip()))
            elif stages:
                stages[-1].instructions.append(Instruction(name, value))
            else:
                key, _, default = value.partition("=")
                arguments[key] = default.strip('"')
        return cls(arguments, {stage.name: stage for stage in stages})

    def finals(self) -> list[Stage]:
        """The stages that nothing is built from: the images."""
        bases = {stage.base for stage in self.stages.values()}
        copied = {stage for each in self.stages.values() for stage in copied_from(each)}
        return [stage for name, stage in self.stages.items() if name not in bases | copied]

    def lineage(self, stage: Stage) -> list[Instruction]:
        """The stage's instructions after those of the stages that it is built upon."""
        before = self.lineage(self.stages[stage.base]) if stage.base in self.stages else []
        return before + stage.instructions

    def last(self, stage: Stage, name: str) -> str:
        return [each.value for each in self.lineage(stage) if each.name == name][-1]


def copied_from(stage: Stage) -> set[str]:
    flags = [word for value in stage.values("COPY") for word in value.split() if word.startswith("--from=")]
    return {flag.removeprefix("--from=") for flag in flags}


def context_sources(stage: Stage) -> list[str]:
    """What the stage copies out of the repository."""
    copies = [value.split() for value in stage.values("COPY") if "--from=" not in value]
    return [source for words in copies for source in words[:-1]]


def is_exec_form(value: str) -> bool:
    try:
        words = json.loads(value)
    except json.JSONDecodeError:
        return False
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


def pins(lock: str) -> dict[str, str]:
    """Name -> version of a lock file."""
    text = (IMAGES / "locks" / f"{lock}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9][a-z0-9-]*)==([^\s;\\]+)", text, re.MULTILINE))
