"""The history of promotions: numbered without gaps, never rewritten, one winner a number, the way back always open."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbit_core.errors import InputError
from orbit_core.publication.promotions import Overtaken, Promotion, Promotions, Published, find_published, trained_as
from orbit_core.steps.contract import InputRef, StepSpec
from orbit_core.store import Store, open_store
from orbit_core.store.artifacts import ArtifactStore


def publish(store: Store, folder: Path, number: int, warm_start: Published | None = None) -> Published:
    """A published adapter with the train and evaluate artifacts that it is made of, through the real writer."""

    def made(step: str, facts: dict[str, object], files: dict[str, str], **inputs: InputRef) -> StepSpec:
        spec = StepSpec(step=step, version=1, params={"number": number}, inputs=inputs, store=store.url)
        for name, content in files.items():
            (folder / step / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / step / name).write_text(content)
        ArtifactStore(store).publish(spec, folder / step, facts)
        return spec

    base = InputRef(step="quantize", digest="ba5e" * 16)
    start = {"warm_start": InputRef(step="train", digest=warm_start.train)} if warm_start else {}
    train = made("train", {}, {"summary.json": "{}"}, quantized=base, **start)
    facts: dict[str, object] = {"accuracy_after": number / 100, "prompts": 100}
    evaluate = made("evaluate", facts, {"evaluation.json": "{}"}, train=train.ref())
    files = {"adapter/adapter_model.safetensors": f"tensors {number}", "merged/model.safetensors": "large"}
    spec = made(
        "publish",
        {"adapter_digest": f"{number:064x}"},
        files,
        quantized=base,
        train=train.ref(),
        evaluate=evaluate.ref(),
    )
    found = ArtifactStore(store).find("publish", spec.digest)
    assert found is not None
    return Published.of(found)


def promoted(store: Store, folder: Path, count: int) -> list[Promotion]:
    history, entries = Promotions(store, "sums"), []
    for number in range(1, count + 1):
        entries.append(history.promote(publish(store, folder, number), history.newest(), f"reason {number}"))
    return entries


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "store" if request.param == "folder" else request.getfixturevalue("s3_url"))


def test_an_entry_names_all_that_one_wants_to_know_of_an_adapter(store: Store, tmp_path: Path) -> None:
    first = publish(store, tmp_path, 1)
    second = publish(store, tmp_path, 2, warm_start=first)
    history = Promotions(store, "sums")
    history.promote(second, None, "better")
    content = json.loads(store.read("promotions/sums/000001.json"))
    assert content["warm_start"] == first.train and content["accuracy"] == 0.02 and content["why"] == "better"
    assert store.read(f"{content['adapter']}/adapter_model.safetensors") == b"tensors 2"
    assert content["base_digest"] == "ba5e" * 16 and content["when"].endswith("+00:00")
    assert history.entries() == [history.newest()]


def test_of_many_writers_after_the_same_entry_one_wins_and_the_others_are_told(store: Store, tmp_path: Path) -> None:
    (first,) = promoted(store, tmp_path, 1)
    adapters = [publish(store, tmp_path, number) for number in range(2, 8)]

    def write(adapter: Published) -> Promotion | None:
        try:
            return Promotions(store, "sums").promote(adapter, first, "mine")
        except Overtaken as error:
            assert "number 2 was written meanwhile" in str(error)
            return None

    with ThreadPoolExecutor(len(adapters)) as pool:
        written = [entry for entry in pool.map(write, adapters) if entry]
    assert [entry.number for entry in Promotions(store, "sums").entries()] == [1, 2]
    assert written == [Promotions(store, "sums").newest()]


def test_an_answer_that_was_lost_is_not_taken_for_defeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 may write, lose its answer, and refuse the repeated request: whose entry it is stands in the entry."""
    store = open_store(tmp_path / "store")
    write = store.put_if_absent
    monkeypatch.setattr(store, "put_if_absent", lambda path, content: bool(write(path, content)) and False)
    entry = Promotions(store, "sums").promote(_adapter(store, tmp_path), None, "mine")
    assert entry.number == 1 and Promotions(store, "sums").newest() == entry


def _adapter(store: Store, folder: Path) -> Published:
    return publish(open_store(store.url), folder, 1)


def test_a_rollback_is_a_new_entry_and_going_back_twice_goes_back_two(store: Store, tmp_path: Path) -> None:
    one, two, _ = promoted(store, tmp_path, 3)
    history = Promotions(store, "sums")
    back = history.roll_back(why="complaints")
    assert (back.number, back.replaced, back.restores, back.publish) == (4, 3, 2, two.publish)
    assert history.roll_back().publish == one.publish
    with pytest.raises(InputError, match="entry 1 serves, the first"):
        history.roll_back()
    again = history.roll_back(to=4)
    assert again.restores == 2 and again.publish == two.publish, "an entry that points back is followed"
    assert [entry.number for entry in history.entries()] == [1, 2, 3, 4, 5, 6]


@settings(max_examples=40)
@given(moves=st.lists(st.one_of(st.just("promote"), st.just("back"), st.integers(1, 9)), max_size=12))
def test_whatever_is_done_what_serves_is_what_a_stack_of_adapters_says(
    moves: list[str | int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The model: promoting pushes on what serves, going back pops, `--to` returns to where an entry stood."""
    folder = tmp_path_factory.mktemp("history")
    store = open_store(folder / "store")
    history = Promotions(store, "sums")
    stacks: list[tuple[str, ...]] = [()]  # stacks[n]: adapters under and at entry n
    for made, move in enumerate(moves, start=1):
        stack = stacks[-1]
        if move == "promote":
            adapter = publish(store, folder, made)
            history.promote(adapter, history.newest(), "")
            stacks.append((*stack, adapter.publish))
        elif (move == "back" and len(stack) > 1) or (isinstance(move, int) and move < len(stacks)):
            target = stack[:-1] if move == "back" else stacks[int(move)]
            if target[-1] == stack[-1]:
                continue
            history.roll_back(None if move == "back" else int(move))
            stacks.append(target)
        else:
            with pytest.raises(InputError):
                history.roll_back(None if move == "back" else int(move))
        assert (history.newest().publish if history.newest() else None) == (stacks[-1][-1] if stacks[-1] else None)  # type: ignore[union-attr]
    assert [entry.number for entry in history.entries()] == list(range(1, len(stacks)))


def test_bytes_that_changed_or_are_gone_do_not_serve_again(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    one, two, _ = promoted(store, tmp_path, 3)
    store.put(f"{two.adapter}/adapter_model.safetensors", b"other tensors")
    with pytest.raises(InputError, match="sha256"):
        Promotions(store, "sums").roll_back()
    store.delete(f"artifacts/publish/{one.publish[:16]}.json")
    with pytest.raises(InputError, match="gone"):
        Promotions(store, "sums").roll_back(to=1)
    assert len(Promotions(store, "sums").entries()) == 3


def test_a_published_adapter_is_found_by_the_beginning_of_its_digest(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    entry = promoted(store, tmp_path, 1)[0]
    assert find_published(store, entry.publish[:8]).manifest.digest == entry.publish
    assert find_published(store, entry.publish).manifest.digest == entry.publish
    assert {trained_as(store, "sums", each) for each in ("promoted", "1", entry.publish[:20])} == {entry.train}
    for wrong, words in (("0" * 8, "orbit run"), ("xyz", "hex"), (entry.publish[:63] + "g", "hex")):
        with pytest.raises(InputError, match=words):
            find_published(store, wrong)


def test_a_name_that_no_recipe_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lower-case"):
        Promotions(open_store(tmp_path), "../other")


def orbit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_by_hand_promote_look_and_roll_back(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    store = open_store(url)
    first, second = publish(store, tmp_path, 1), publish(store, tmp_path, 2)
    assert orbit("promotions", "sums", "--store", url).returncode == 42
    for adapter in (first, second):
        done = orbit("promote", "sums", adapter.publish[:12], "--store", url, "--why", "it is good")
        assert done.returncode == 0, done.stderr
    listed = orbit("promotions", "sums", "--store", url)
    assert "it is good" in listed.stdout and f"serves: {store.url_of(second.adapter)}" in listed.stdout
    back = orbit("rollback", "sums", "--store", url)
    assert back.returncode == 0 and back.stdout.startswith("promotion 3 of sums, as in 1: ")
    where = orbit("promotions", "sums", "--store", url, "--adapter").stdout.strip()
    assert Path(where, "adapter_model.safetensors").read_text() == "tensors 1"
    entries = json.loads(orbit("promotions", "sums", "--store", url, "--json").stdout)
    assert [entry["number"] for entry in entries] == [1, 2, 3] and entries[2]["restores"] == 1
