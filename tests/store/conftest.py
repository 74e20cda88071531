"""Each law of the store is checked on a folder and on a real S3 server on loopback (moto)."""

from __future__ import annotations

from pathlib import Path

import pytest

from orbit_core.store import Store, open_store


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["folder", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_url")


@pytest.fixture
def store(store_url: str) -> Store:
    return open_store(store_url)
