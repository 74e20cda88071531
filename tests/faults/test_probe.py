"""A store that does not keep the one promise that everything rests on is refused before anything works on it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from proxy import Faults, Proxy

from orbit_core.errors import InputError
from orbit_core.store.checking import check_conditional_writes, ensure_fit
from orbit_core.store.s3 import S3Store

DEAF = Faults(deaf=frozenset({"if-none-match"}))


def test_a_server_that_ignores_the_condition_is_refused_with_the_reason(proxy: Proxy, store: S3Store) -> None:
    proxy.faults = DEAF
    with pytest.raises(InputError, match=r"second writer(.|\n)*both were told(.|\n)*If-None-Match") as error:
        ensure_fit(store.url)
    assert error.value.exit_code == 42
    assert store.list() == [], "the probe cleans up behind itself"


def test_a_good_store_on_a_bad_line_is_not_refused_and_asked_once(proxy: Proxy, store: S3Store) -> None:
    for fault in ("lost", "errors", "cut_up", "cut_down"):
        proxy.aim(fault, "PUT", "checks/")
        proxy.aim(fault, "GET", "checks/")
        check_conditional_writes(store)
    ensure_fit(store.url)
    asked = len(proxy.seen)
    ensure_fit(store.url)
    assert len(proxy.seen) == asked


def test_a_late_listing_is_no_reason_to_refuse(proxy: Proxy, store: S3Store) -> None:
    proxy.faults = Faults(stale=3600)
    check_conditional_writes(store)


def test_the_command_refuses_before_its_step_starts(proxy: Proxy, store: S3Store) -> None:
    proxy.faults = DEAF
    command = [sys.executable, "-c", "from flows.cli import main; main()", "data", "demo", "--store", store.url]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert ran.returncode == 42 and "If-None-Match" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
    assert store.list() == []
