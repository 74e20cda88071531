"""A full disk and a read-only one: a clear error, nothing that a reader could take for a result, and it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "small_disk.py"), str(tmp_path_factory.mktemp("disk"))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def test_training_on_a_disk_that_fills_up_stops_and_goes_on_bit_for_bit(happened: dict[str, Any]) -> None:
    stopped = [trial for trial in happened["train"] if trial["error"]]
    assert stopped, "no disk was small enough"
    for trial in stopped:
        assert "expected: room on the disk" in trial["error"] and "run again: it goes on" in trial["error"]
        assert trial["code"] == 1, "there may be room again"
    assert len({trial["seen"]["steps"] for trial in happened["train"]}) > 1 or not happened["mounted"]
    assert all(trial["seen"]["damages"] == [] for trial in happened["train"])
    assert all(trial["same"] for trial in happened["train"])


def test_a_step_on_a_full_disk_leaves_nothing_to_be_taken_for_a_result(happened: dict[str, Any]) -> None:
    full = happened["full"]
    assert "expected: room on the disk" in full["error"] and "free in" in full["error"] and full["code"] == 1
    assert full["seen"]["manifests"] == 0 and full["again"]
    assert full["resumed_from"] > 0, "what the first try had counted is not counted again"


def test_a_read_only_store_is_refused_and_nothing_is_written(happened: dict[str, Any]) -> None:
    refused = happened["read_only"]
    assert refused["kind"] == "InputError" and refused["code"] == 42
    assert "a folder that can be written to" in refused["error"] and refused["left"] == 0
    assert refused["again"], "writable again, it works"
