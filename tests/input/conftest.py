"""The folders whose small models these tests damage, and one good world made once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from doors import World

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "checkpoints"), str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from doors import make_world

    return make_world(tmp_path_factory.mktemp("world"))
