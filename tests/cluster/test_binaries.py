"""Where the control plane's programs come from. `go` is played by a script: the real build takes minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster.binaries import PROGRAMS, assets, cached, why_not

from orbit_core.errors import InputError

GO = """#!/bin/sh
echo "$@" >> "$GO_CALLS"
while [ "$1" != "-o" ]; do shift; done
case "$2" in
    */) for program in kube-apiserver kube-controller-manager kube-scheduler kubectl; do touch "$2$program"; done;;
    *) touch "$2";;
esac
sleep 0.3
"""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a cache, whose PATH has nothing."""
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("GO_CALLS", str(tmp_path / "calls"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def give_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin" / "go").write_text(GO)
    (folder / "bin" / "go").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def test_a_folder_that_is_given_must_have_all_programs(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROGRAMS[1:]:
        (bare / name).touch(mode=0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(bare))
    with pytest.raises(InputError, match=f"no {PROGRAMS[0]}"):
        assets()
    (bare / PROGRAMS[0]).touch(mode=0o755)
    assert assets() == bare


def test_two_processes_build_once_and_find_it_afterwards(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_go(bare, monkeypatch)
    command = [sys.executable, str(Path(__file__).with_name("binaries.py"))]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    folders = {process.communicate()[0].decode().strip() for process in processes}
    assert folders == {str(cached())} and sorted(os.listdir(cached())) == sorted(PROGRAMS)
    assert len((bare / "calls").read_text().splitlines()) == 2  # one for each Go module
    assert assets() == cached()
    assert [path.name for path in cached().parent.iterdir() if path.name.startswith("building-")] == []


def test_without_go_the_reason_is_one_line(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = why_not()
    assert reason is not None and "go" in reason and "\n" not in reason
    with pytest.raises(InputError):
        assets()
    give_go(bare, monkeypatch)
    assert why_not() is None
