"""`python -m orbit_core stage`: inputs are on the node before the step asks for them, whole, once, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import Ended, finish, run, start_command, wait_for
from samples import PACKAGE, spec_of

from orbit_core.errors import OrbitError
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.runner import run_step
from orbit_core.steps.staging import stage_inputs
from orbit_core.store import open_store
from orbit_core.store.artifacts import Artifact
from orbit_core.store.digests import sha256_file
from orbit_core.store.fetching import LEFTOVER_SECONDS, made_once

FILES = 24


def begin(spec: StepSpec, folder: Path):
    return start_command(["stage"], spec, folder, "--scratch", str(folder / "scratch"))


def stage(spec: StepSpec, folder: Path) -> Ended:
    return finish(begin(spec, folder))


def made(store: Path | str, folder: Path) -> tuple[StepSpec, Artifact]:
    """The spec of a step, and the artifact that it has for an input."""
    first = spec_of(store, "count", to=FILES)
    artifact = run_step(first, lambda *event, **values: None, scratch=folder / "elsewhere", package=PACKAGE)
    return spec_of(store, "add", {"numbers": first.ref()}, at_most=10_000), artifact


def cached(folder: Path) -> list[str]:
    """Everything in the cache, also what is hidden."""
    return sorted(path.name for path in (folder / "scratch" / "artifacts").iterdir())


def test_the_step_finds_its_inputs_on_the_node(s3_url: str, tmp_path: Path) -> None:
    spec, artifact = made(s3_url, tmp_path)
    code, events, _ = stage(spec, tmp_path)
    assert code == 0 and events[-1]["orbit"] == "staged" and events[-1]["bytes"] == artifact.size
    steps = [event for event in events if event["orbit"] == "progress"]
    assert [event["total"] for event in steps] == [artifact.size] * FILES and steps[-1]["done"] == artifact.size
    assert steps[0]["message"] == "staging numbers" and steps[0]["unit"] == "bytes"
    store = open_store(s3_url)
    for path in store.list(artifact.prefix):
        store.delete(path)
    assert run(spec, tmp_path, "--scratch", str(tmp_path / "scratch"))[0] == 0, "nothing was read again"


def test_staging_again_does_nothing(s3_url: str, tmp_path: Path) -> None:
    spec, _ = made(s3_url, tmp_path)
    stage(spec, tmp_path)
    code, events, _ = stage(spec, tmp_path)
    assert code == 0 and [(event["orbit"], event["bytes"]) for event in events] == [("staged", 0)]


def test_from_a_folder_store_nothing_is_copied(tmp_path: Path) -> None:
    spec, _ = made(tmp_path / "store", tmp_path)
    code, events, _ = stage(spec, tmp_path)
    assert code == 0 and events[-1]["bytes"] == 0
    assert not (tmp_path / "scratch").exists()


def test_for_a_step_that_is_done_nothing_is_fetched(s3_url: str, tmp_path: Path) -> None:
    spec, _ = made(s3_url, tmp_path)
    run(spec, tmp_path, "--scratch", str(tmp_path / "elsewhere"))
    code, events, _ = stage(spec, tmp_path)
    assert code == 0 and [(event["orbit"], event["bytes"]) for event in events] == [("staged", 0)]
    assert not (tmp_path / "scratch").exists()


def test_an_input_that_was_not_made_is_refused(tmp_path: Path) -> None:
    missing = spec_of(tmp_path / "store", "count", to=3)
    code, events, _ = stage(spec_of(tmp_path / "store", "add", {"numbers": missing.ref()}), tmp_path)
    assert code == 42 and "run step count of the same recipe first" in events[-1]["message"]


def assert_whole(artifact: Artifact, folder: Path) -> None:
    """What was staged is, byte for byte, what was published."""
    staged = folder / "scratch" / "artifacts" / f"{artifact.manifest.digest[:16]}-{artifact.manifest.attempt}"
    assert {name: sha256_file(staged / name) for name in artifact.manifest.files} == {
        name: entry.sha256 for name, entry in artifact.manifest.files.items()
    }


def test_two_stagers_on_one_node_fetch_once(s3_url: str, tmp_path: Path) -> None:
    spec, artifact = made(s3_url, tmp_path)
    first = begin(spec, tmp_path)
    wait_for(first, "progress", "staging")
    second = begin(spec, tmp_path)
    code, events, _ = finish(second)
    assert code == 0 and events[-1]["orbit"] == "staged"
    assert [event["message"] for event in events[:-1]] in (
        [],  # it came when all was done
        [f"waiting: process {first.pid} on {os.uname().nodename} stages numbers"],
    )
    assert finish(first)[0] == 0
    assert cached(tmp_path) == [f"{artifact.manifest.digest[:16]}-{artifact.manifest.attempt}"]
    assert_whole(artifact, tmp_path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_stager_is_gone_on_with(s3_url: str, tmp_path: Path, how: signal.Signals) -> None:
    spec, artifact = made(s3_url, tmp_path)
    process = begin(spec, tmp_path)
    wait_for(process, "progress", "staging")
    process.send_signal(how)
    assert finish(process)[0] == (75 if how == signal.SIGTERM else -how)
    name = f"{artifact.manifest.digest[:16]}-{artifact.manifest.attempt}"
    partial = tmp_path / "scratch" / "artifacts" / f".{name}.partial"
    kept = {path.name: path.stat().st_ino for path in (partial / "parts").glob("*.txt")}
    assert 0 < len(kept) < FILES, "it was stopped in the middle"
    damaged = partial / "parts" / next(iter(kept))
    damaged.write_text("a power cut does such things")
    (partial / "parts" / ".half").write_text("a file that was being written")
    assert stage(spec, tmp_path)[0] == 0
    assert cached(tmp_path) == [name]
    assert_whole(artifact, tmp_path)
    whole = {path.name: path.stat().st_ino for path in (tmp_path / "scratch" / "artifacts" / name / "parts").iterdir()}
    assert len(whole) == FILES
    assert all(whole[file] == inode for file, inode in kept.items() if file != damaged.name), "they were fetched again"


def test_a_stager_says_when_there_is_no_room(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = made(s3_url, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OrbitError, match=r"scratch_gib") as error:
        stage_inputs(spec, lambda *a, **k: None, tmp_path / "scratch")
    assert error.value.exit_code == 1, "another node may have room"


def aged(path: Path, seconds: float) -> None:
    for each in (path, *path.rglob("*")):
        os.utime(each, (time.time() - seconds,) * 2)


def test_what_nobody_goes_on_with_is_removed_after_a_day(tmp_path: Path) -> None:
    old, young = LEFTOVER_SECONDS + 60, LEFTOVER_SECONDS - 60
    for name, begun, last_file in (("dead", old, old), ("long", old, young), ("young", young, young)):
        (tmp_path / f".{name}.partial" / "deep").mkdir(parents=True)
        (tmp_path / f".{name}.partial" / "deep" / "file").write_text("half")
        (tmp_path / f".{name}.lock").touch()
        aged(tmp_path / f".{name}.partial", last_file)
        aged(tmp_path / f".{name}.lock", begun)
    made_once(tmp_path / "new", lambda partial: (partial / "file").touch())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".long.lock", ".long.partial", ".young.lock", ".young.partial", "new",
    ]  # fmt: skip


def test_what_somebody_is_at_stays_however_old(tmp_path: Path) -> None:
    def make_slow(partial: Path) -> None:
        (partial / "file").touch()
        aged(partial, 3 * LEFTOVER_SECONDS)
        made_once(tmp_path / "other", lambda other: (other / "file").touch())
        assert (partial / "file").exists()

    assert (made_once(tmp_path / "slow", make_slow) / "file").exists()


def test_a_failed_try_is_found_by_the_next(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "first").touch()
        raise OSError("the network")

    with pytest.raises(OSError, match="the network"):
        made_once(tmp_path / "thing", fail)
    assert not (tmp_path / "thing").exists()
    made_once(tmp_path / "thing", lambda partial: (partial / "second").touch())
    assert sorted(path.name for path in (tmp_path / "thing").iterdir()) == ["first", "second"]
