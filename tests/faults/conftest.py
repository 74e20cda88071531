"""The S3 server of the tests behind a proxy that does harm; stores see the proxy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from proxy import Proxy

from orbit_core.store.s3 import S3Store

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("rl", "steps")]


@pytest.fixture
def proxy(s3_endpoint: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(s3_endpoint, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def store(proxy: Proxy, s3_url: str) -> S3Store:
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix, patience=20)
