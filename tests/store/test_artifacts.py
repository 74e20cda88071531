"""Artifacts are visible whole or not at all, one for each digest, and say nothing about the machine or its secrets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orbit_core.errors import InputError
from orbit_core.steps.contract import InputRef, StepSpec
from orbit_core.store import Store, open_store
from orbit_core.store.artifacts import ArtifactStore


def spec_of(store_url: str, **params: object) -> StepSpec:
    inputs = {
        "base": InputRef(digest="b" * 64, path="/home/somebody/model"),
        "up": InputRef(digest="c" * 64, step="up"),
    }
    return StepSpec(step="sample", version=1, params=params, inputs=inputs, store=store_url)


def output(folder: Path, content: str = "x") -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "top.txt").write_text(content)
    (folder / "deep" / "er.txt").write_text(content * 2)
    return folder


def test_what_is_published_is_found_and_fetched(store: Store, store_url: str, tmp_path: Path) -> None:
    artifacts, spec = ArtifactStore(store), spec_of(store_url)
    assert artifacts.find(spec.step, spec.digest) is None
    artifacts.publish(spec, output(tmp_path / "out"), {"accuracy": 0.5})
    found = artifacts.find(spec.step, spec.digest)
    assert found is not None and found.facts == {"accuracy": 0.5}
    directory = found.fetch(tmp_path / "scratch")
    assert (directory / "deep" / "er.txt").read_text() == "xx"
    assert found.fetch(tmp_path / "scratch") == directory
    found.verify()


def test_a_folder_store_hands_out_the_artifact_itself(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    artifact = ArtifactStore(open_store(url)).publish(spec_of(url), output(tmp_path / "out"), {})
    assert artifact.fetch(tmp_path / "scratch") == tmp_path / "store" / artifact.prefix
    assert not (tmp_path / "scratch").exists()


def test_the_later_of_two_publications_returns_the_first_and_leaves_nothing(
    store: Store, store_url: str, tmp_path: Path
) -> None:
    artifacts, spec = ArtifactStore(store), spec_of(store_url)
    first = artifacts.publish(spec, output(tmp_path / "1", "first"), {"try": 1})
    second = artifacts.publish(spec, output(tmp_path / "2", "second"), {"try": 2})
    assert second.manifest == first.manifest
    assert len(store.list("artifacts/sample/")) == 3
    assert store.read(f"{second.prefix}/top.txt") == b"first"


def test_of_many_publications_at_once_one_wins_and_only_its_files_stay(
    store: Store, store_url: str, tmp_path: Path
) -> None:
    artifacts, spec = ArtifactStore(store), spec_of(store_url)
    outputs = [output(tmp_path / str(n), str(n)) for n in range(8)]
    together = threading.Barrier(8)

    def publish(n: int) -> str:
        together.wait()
        return artifacts.publish(spec, outputs[n], {"try": n}).manifest.attempt

    with ThreadPoolExecutor(8) as pool:
        attempts = set(pool.map(publish, range(8)))
    assert len(attempts) == 1
    found = artifacts.find(spec.step, spec.digest)
    assert found is not None
    found.verify()
    assert store.read(f"{found.prefix}/top.txt") == str(found.facts["try"]).encode()


def test_the_winner_sweeps_what_dead_tries_left(store: Store, store_url: str, tmp_path: Path) -> None:
    spec = spec_of(store_url)
    store.put(f"artifacts/sample/{spec.digest[:16]}/deadtry/top.txt", b"half")
    store.put("artifacts/sample/another/try/top.txt", b"not ours")
    artifact = ArtifactStore(store).publish(spec, output(tmp_path / "out"), {})
    others = {path for path in store.list() if not path.startswith(artifact.prefix)}
    assert others == {f"artifacts/sample/{spec.digest[:16]}.json", "artifacts/sample/another/try/top.txt"}


def test_a_manifest_holds_no_secret_and_no_path_of_the_machine(
    store: Store, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "wandb-secret")
    spec = spec_of(store_url)
    ArtifactStore(store).publish(spec, output(tmp_path / "out"), {})
    text = store.read(f"artifacts/sample/{spec.digest[:16]}.json").decode()
    for private in ("test-secret-value", "wandb-secret", str(tmp_path), "/home/somebody", store_url):
        assert private not in text
    assert json.loads(text)["inputs"]["base"] == {"digest": "b" * 64, "step": None}


def test_a_damaged_file_is_named(store: Store, store_url: str, tmp_path: Path) -> None:
    artifact = ArtifactStore(store).publish(spec_of(store_url), output(tmp_path / "out"), {})
    store.put(f"{artifact.prefix}/deep/er.txt", b"flipped")
    named = rf"{artifact.prefix}/deep/er.txt in store {store_url}\n  expected: sha256(.|\n)*orbit redo {artifact.url}"
    for read in (artifact.verify, lambda: artifact.fetch(tmp_path / "scratch")):
        with pytest.raises(InputError, match=named + " --input base=PATH$"):
            read()
    assert not list((tmp_path / "scratch").rglob("er.txt")), "a damaged download must not be kept"


PUBLISH = """
import os, signal, sys
from pathlib import Path
from orbit_core.steps.contract import StepSpec
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore

def publish(spec, output, die_before):
    calls = 0
    def dying(call):
        def wrapped(*arguments, **options):
            nonlocal calls
            if calls == die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return call(*arguments, **options)
        return wrapped
    for name in ("link", "fsync", "unlink", "mkdir", "rename"):
        setattr(os, name, dying(getattr(os, name)))
    ArtifactStore(open_store(spec.store)).publish(spec, output, {})

for line in sys.stdin:  # one forked try a line, so that Python starts once
    spec, output, die_before = line.rstrip().split("\\t")
    child = os.fork()
    if child == 0:
        publish(StepSpec.model_validate_json(spec), Path(output), int(die_before))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_before_any_of_its_writes_a_publication_is_whole_or_absent(tmp_path: Path) -> None:
    """SIGKILL before the n-th call that changes the disk, for every n until the publication survives."""
    seen, code = set(), None
    with subprocess.Popen([sys.executable, "-c", PUBLISH], stdin=-1, stdout=-1, text=True) as tries:
        assert tries.stdin is not None and tries.stdout is not None
        for die_before in range(200):
            url = str(tmp_path / f"store{die_before}")
            spec = spec_of(url)
            out = output(tmp_path / f"out{die_before}")
            print(spec.model_dump_json(), out, die_before, sep="\t", file=tries.stdin, flush=True)
            code = int(tries.stdout.readline())
            artifacts = ArtifactStore(open_store(url))
            found = artifacts.find(spec.step, spec.digest)
            seen.add(found is not None)
            if found is not None:
                found.verify()
                assert sorted(found.manifest.files) == ["deep/er.txt", "top.txt"]
            if code == 0:
                break
            assert code == -signal.SIGKILL
            artifacts.publish(spec, output(tmp_path / f"again{die_before}"), {}).verify()
            assert len(open_store(url).list()) == 3, "nothing of the dead try is left"
        tries.stdin.close()
    assert code == 0 and die_before > 10 and seen == {True, False}


def test_a_second_fetch_from_s3_reads_nothing_again(s3_url: str, tmp_path: Path) -> None:
    store = open_store(s3_url)
    artifact = ArtifactStore(store).publish(spec_of(s3_url), output(tmp_path / "out"), {})
    fetched = artifact.fetch(tmp_path / "scratch")
    for path in store.list(artifact.prefix):
        store.delete(path)
    assert artifact.fetch(tmp_path / "scratch") == fetched
    assert [entry.name for entry in (tmp_path / "scratch" / "artifacts").iterdir()] == [fetched.name]
