"""`orbit verify` and `orbit redo`: whatever bit flips, it is named, and one command makes the artifact again."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("rl", "steps")]
from bandit import bandit_loop
from samples import PACKAGE, spec_of

from orbit_core.errors import InputError
from orbit_core.executors.local import LocalExecutor
from orbit_core.steps.contract import InputRef, StepSpec
from orbit_core.store import Store, open_store
from orbit_core.store.artifacts import Artifact, ArtifactStore
from orbit_core.store.digests import digest_path
from orbit_core.store.manifests import manifest_path, read_manifest
from orbit_core.store.redoing import redo
from orbit_core.store.rollouts import rollouts_path
from orbit_core.store.verifying import damages_of, place_of


@pytest.fixture(autouse=True)
def samples_importable_in_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path[-1:], os.environ.get("PYTHONPATH", "")]))


def published(store: Store, folder: Path) -> Artifact:
    (folder / "out" / "deep").mkdir(parents=True)
    (folder / "out" / "top.bin").write_bytes(bytes(range(256)))
    (folder / "out" / "deep" / "text").write_text("x" * 40)
    return ArtifactStore(store).publish(spec_of(store.url, "sample", n=1), folder / "out", {"accuracy": 0.5})


def flip(store: Store, path: str, bit: int) -> bytes:
    """Flip one bit of a file; returns the bytes before."""
    content = store.read(path)
    changed = bytearray(content)
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    store.put(path, bytes(changed))
    return content


def test_a_whole_store_has_no_damage(store: Store, tmp_path: Path) -> None:
    artifact = published(store, tmp_path)
    bandit_loop(store).run()
    read: list[str] = []
    assert list(damages_of(place_of(store.url), read.append)) == []
    assert read == [f"sample/{artifact.manifest.digest[:16]}", "run bandit"]
    for place in (
        artifact.url,
        artifact.url + "/deep/text",
        store.url_of(manifest_path("sample", artifact.manifest.digest)),
    ):
        assert place_of(place).manifest == manifest_path("sample", artifact.manifest.digest)
        assert list(damages_of(place_of(place))) == []


def test_a_flipped_bit_in_any_file_of_an_artifact_is_found_and_named(tmp_path: Path) -> None:
    store, chance = open_store(tmp_path / "store"), random.Random(0)
    artifact = published(store, tmp_path)
    manifest = manifest_path("sample", artifact.manifest.digest)
    for path in store.list():
        size = len(store.read(path)) * 8
        for bit in chance.sample(range(size), 150 if path == manifest else 20):
            before = flip(store, path, bit)
            damages = list(damages_of(place_of(store.url)))
            assert damages, f"bit {bit} of {path}"
            if path != manifest:
                assert len(damages) == 1 and path in damages[0].what and damages[0].fix == f"orbit redo {artifact.url}"
            store.put(path, before)
    assert list(damages_of(place_of(store.url))) == []


def test_reading_an_artifact_finds_it_too(store: Store, tmp_path: Path) -> None:
    artifact = published(store, tmp_path)
    artifact.fetch(tmp_path / "scratch")
    flip(store, f"{artifact.prefix}/top.bin", 77)
    fresh = tmp_path / "other-scratch"
    with pytest.raises(InputError, match=rf"{artifact.prefix}/top.bin(.|\n)*orbit redo") as error:
        artifact.fetch(fresh)
    assert error.value.exit_code == 42, "trying again finds the same bytes"
    flip(store, manifest_path("sample", artifact.manifest.digest), 800)
    with pytest.raises(InputError, match="manifest artifacts/sample"):
        ArtifactStore(store).find("sample", artifact.manifest.digest)


def test_a_copy_that_was_damaged_on_this_machine_is_fetched_again(s3_url: str, tmp_path: Path) -> None:
    artifact = published(open_store(s3_url), tmp_path)
    copy = artifact.fetch(tmp_path / "scratch") / "top.bin"
    copy.write_bytes(b"damaged")
    assert artifact.fetch(tmp_path / "scratch") == copy.parent
    assert copy.read_bytes() == bytes(range(256))
    assert [entry.name for entry in copy.parents[1].iterdir()] == [copy.parent.name]


def test_a_missing_file_and_a_missing_manifest_are_named(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    artifact = published(store, tmp_path)
    store.delete(f"{artifact.prefix}/deep/text")
    (damage,) = damages_of(place_of(artifact.url))
    assert "deep/text" in damage.what and damage.found == "no such file"
    store.delete(manifest_path("sample", artifact.manifest.digest))
    (damage,) = damages_of(place_of(artifact.url))
    assert damage.found == "no such file" and "orbit run" in damage.fix


def test_an_older_manifest_without_a_seal_is_read(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    artifact = published(store, tmp_path)
    path = manifest_path("sample", artifact.manifest.digest)
    fields = json.loads(store.read(path))
    fields.pop("seal")
    store.put(path, json.dumps({**fields, "schema_version": 1}).encode())
    assert read_manifest(store, path).files == artifact.manifest.files
    assert list(damages_of(place_of(store.url))) == []


def test_damage_to_a_run_is_named(tmp_path: Path) -> None:
    """Bits of every column, the newest states, a commit that was exchanged, a step that is gone."""
    store = open_store(tmp_path / "store")
    last = bandit_loop(store).run()
    file, other = rollouts_path("bandit", 0), rollouts_path("bandit", 1)
    group = pq.read_metadata(store.local_path(file)).row_group(0)
    for column in map(group.column, range(group.num_columns)):
        end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
        before = flip(store, file, end * 8 - 3)
        assert [file in damage.what for damage in damages_of(place_of(store.url))] == [True], column.path_in_schema
        store.put(file, before)
    before = flip(store, last.state.path, 4000)
    (damage,) = damages_of(place_of(store.url_of("rollouts/run=bandit")))
    assert last.state.path in damage.what and "restore" in damage.fix
    store.put(last.state.path, before)
    before = store.read(file)
    store.put(file, store.read(other))
    assert any(file in damage.what for damage in damages_of(place_of(store.url)))
    store.put(file, before)
    store.delete(other)
    assert any(other in damage.what for damage in damages_of(place_of(store.url)))


def test_a_place_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        place_of(str(tmp_path / "nowhere"))


def test_redo_makes_the_artifact_again_and_leaves_a_whole_one(tmp_path: Path) -> None:
    """With an input from the store and one of the person's own, which has to be named and has to be the same."""
    url, executor = str(tmp_path / "store"), LocalExecutor(package=PACKAGE)
    own = tmp_path / "own"
    (own / "parts").mkdir(parents=True)
    (own / "parts" / "1").write_text("1\n")
    (own / "parts" / "2").write_text("2\n")
    spec = StepSpec(
        step="add",
        version=1,
        params={"at_most": 10},
        inputs={"numbers": InputRef(path=str(own), digest=digest_path(own))},
        store=url,
    )
    artifact = executor.run(spec, lambda event: None)
    place = place_of(artifact.url)
    assert redo(place, {}, executor) is None, "it is whole"
    flip(place.store, f"{artifact.prefix}/sum.txt", 3)
    (damage,) = damages_of(place)
    assert damage.fix == f"orbit redo {artifact.url} --input numbers=PATH"
    with pytest.raises(InputError, match="input numbers") as refusal:
        redo(place, {}, executor)
    assert refusal.value.fix == damage.fix
    with pytest.raises(InputError, match="content digest"):
        redo(place, {"numbers": str(own / "parts")}, executor)
    assert place.store.exists(str(place.manifest)), "nothing was taken away in vain"
    again = redo(place, {"numbers": str(own)}, executor)
    assert again is not None and again.manifest.files == artifact.manifest.files
    assert list(damages_of(place_of(url))) == []
    assert not place.store.list(artifact.prefix), "and nothing is left of the damaged one"


def test_redo_of_a_damaged_manifest_takes_it_away_and_says_what_to_run(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    artifact = published(store, tmp_path)
    flip(store, manifest_path("sample", artifact.manifest.digest), 99)
    with pytest.raises(InputError, match="orbit run RECIPE"):
        redo(place_of(artifact.url), {}, LocalExecutor(package=PACKAGE))
    assert ArtifactStore(store).find("sample", artifact.manifest.digest) is None
