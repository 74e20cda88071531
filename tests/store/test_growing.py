"""Unfinished files go from try to try: what the ledger says is there, nothing else counts, nobody interferes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orbit_core.errors import InputError, Interrupted
from orbit_core.steps.contract import StepSpec
from orbit_core.steps.workspace import Workspace
from orbit_core.store import growing as module
from orbit_core.store import open_store
from orbit_core.store.digests import sha256_file
from orbit_core.store.growing import LEDGER, Growing, hand_down


def begun(folder: Path, identity: object = "a model") -> Growing:
    growing = Growing(folder)
    growing.begin(identity)
    return growing


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    """Left by a try that died: `one` is whole, `two` has one of its units."""
    folder = tmp_path / "unfinished"
    growing = begun(folder)
    growing.part("one").write_bytes(b"whole")
    growing.record("a", "one")
    growing.finish("one")
    growing._finishing[0].result()
    growing.part("two").write_bytes(b"half")
    growing.record("b", "two", rows=3)
    growing.close()
    return folder


def test_the_next_try_knows_what_was_done_and_hands_all_of_it_over(half_done: Path, tmp_path: Path) -> None:
    growing = begun(half_done)
    assert list(growing.units) == ["a", "b"] and growing.units["b"]["rows"] == 3
    growing.finish("two")
    output = tmp_path / "output"
    output.mkdir()
    growing.hand_over(output)
    assert {path.name: sha256_file(path) for path in output.iterdir()} == growing.digests
    assert set(begun(half_done).digests) == {"one", "two"}, "still here, should publishing fail"


def test_after_a_power_cut_only_whole_files_count(half_done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_boot", lambda: "another start of the machine")
    growing = begun(half_done)
    assert list(growing.units) == ["a"] and list(growing.digests) == ["one"]
    assert sorted(path.name for path in half_done.iterdir()) == [LEDGER, "one"]


def test_a_line_that_was_cut_off_does_not_count(half_done: Path) -> None:
    ledger = half_done / LEDGER
    ledger.write_bytes(ledger.read_bytes()[:-3])
    assert list(begun(half_done).units) == ["a"]
    assert not (half_done / "two.part").exists(), "nobody knows what of it can be used"


@pytest.mark.parametrize("lost", ["one", "two.part"])
def test_units_of_a_file_that_is_gone_are_done_again(half_done: Path, lost: str) -> None:
    (half_done / lost).unlink()
    assert list(begun(half_done).units) == [{"one": "b", "two.part": "a"}[lost]]


def test_what_was_to_become_something_else_is_removed(half_done: Path) -> None:
    growing = begun(half_done, "another model")
    assert not growing.units and [path.name for path in half_done.iterdir()] == [LEDGER]


def test_a_file_that_was_never_finished_is_not_handed_over(half_done: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="two was written to and never finished"):
        begun(half_done).hand_over(tmp_path)


def test_an_error_of_the_other_thread_comes_up(tmp_path: Path) -> None:
    growing = begun(tmp_path / "unfinished")
    growing.record("a", "never-there")
    growing.finish("never-there")
    with pytest.raises(FileNotFoundError):
        growing.hand_over(tmp_path)


def test_who_worked_here_before_can_change_nothing_any_more(half_done: Path, tmp_path: Path) -> None:
    """A holder that lost its lease while it slept wakes with its files open."""
    late = begun(half_done)
    data = os.open(half_done / "two.part", os.O_WRONLY)
    hand_down(half_done, tmp_path / "ours")
    os.pwrite(data, b"late", 0)
    late.record("c", "two")
    with pytest.raises(FileNotFoundError):
        late.part("three").write_bytes(b"late")
    ours = begun(tmp_path / "ours")
    assert "c" not in ours.units and (tmp_path / "ours" / "two.part").read_bytes() == b"half"


def test_it_goes_from_term_to_term_and_not_after_a_refusal(tmp_path: Path) -> None:
    spec = StepSpec(step="quantize", version=1, params={}, inputs={}, store=str(tmp_path))

    def turn(term: int, error: type[Exception], *arguments: str) -> list[str]:
        workspace = Workspace(spec, open_store(tmp_path), term=term)
        with pytest.raises(error), workspace.held(lambda holder: None, lambda: False):
            found = sorted(path.name for path in workspace.unfinished.iterdir())
            (workspace.unfinished / f"of-{term}").write_bytes(b"")
            raise error(*arguments)
        return found

    assert turn(1, Interrupted) == []
    assert turn(3, OSError) == ["of-1"]
    assert turn(4, InputError, "the input") == ["of-1", "of-3"]
    assert turn(5, Interrupted) == []
