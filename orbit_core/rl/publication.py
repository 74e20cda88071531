"""Two-phase publication of an adapter to all rollout engines.

Stage on all, compare each digest with the exported tensors', and only then activate on all. A failure while staging
changes nothing. A failure while activating puts the engines that had already switched back on the old version. Either
way the error names the engine, and every engine that answers is on the old version, generating.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orbit_core.adapters.digest import tensors_digest
from orbit_core.errors import OrbitError
from orbit_core.rollout.base import RolloutEngine


class Publisher:
    """Keeps the last published adapter, so that it can be put back."""

    def __init__(self, engines: Sequence[RolloutEngine]) -> None:
        self.engines = list(engines)
        self._active: tuple[int, dict[str, torch.Tensor]] | None = None

    def publish(self, version: int, tensors: dict[str, torch.Tensor]) -> str:
        """Make `tensors` (PEFT names) the adapter of all engines as `version`; returns their digest.

        Raises OrbitError, naming the engine, when one cannot take it.
        """
        digest = tensors_digest(tensors)
        for number, engine in enumerate(self.engines):
            try:
                arrived = engine.stage_adapter(version, tensors)
            except Exception as error:
                raise OrbitError(self._refusal(number, "stage", version, f"{type(error).__name__}: {error}")) from error
            if arrived != digest:
                found = f"digest {arrived} instead of {digest}"
                raise OrbitError(self._refusal(number, "stage", version, found))
        for number, engine in enumerate(self.engines):
            try:
                engine.activate_adapter(version)
            except Exception as error:
                stuck = self._put_back(number + 1)
                found = "; ".join([f"{type(error).__name__}: {error}", *stuck])
                raise OrbitError(self._refusal(number, "activate", version, found)) from error
        self._active = version, tensors
        return digest

    def _put_back(self, count: int) -> list[str]:
        """The first `count` engines on the old version again; says which could not."""
        if self._active is None:
            return []
        version, tensors = self._active
        stuck = []
        for number, engine in enumerate(self.engines[:count]):
            if engine.adapter_version == version:
                continue
            try:
                engine.stage_adapter(version, tensors)
                engine.activate_adapter(version)
            except Exception as error:
                stuck.append(f"engine {number} could not be put back on version {version}: {error}")
        return stuck

    def _refusal(self, number: int, phase: str, version: int, found: str) -> str:
        old = "none" if self._active is None else str(self._active[0])
        return (
            f"rollout engine {number} of {len(self.engines)} could not {phase} adapter version {version}\n"
            f"  found: {found}\n  active version: {old}\n"
            "  what to do: start again; the run resumes from its last commit"
        )
