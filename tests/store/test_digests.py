"""A content digest is the same wherever and whenever the content is the same, and changes with any byte or name."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orbit_core.errors import InputError
from orbit_core.store import digests
from orbit_core.store.digests import digest_path, sha256_file

names = st.from_regex(r"[a-z][a-z0-9_]{0,5}(/[a-z][a-z0-9_]{0,5}\.bin){0,1}", fullmatch=True)
trees = st.dictionaries(names, st.binary(max_size=20), min_size=1, max_size=5).filter(
    lambda tree: not any(other.startswith(f"{name}/") for name in tree for other in tree)
)


def write(root: Path, tree: dict[str, bytes], order: bool = False) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    for name, content in sorted(tree.items(), reverse=order):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=trees, two=trees)
def test_directories_have_equal_digests_exactly_when_their_content_is_equal(
    tmp_path: Path, one: dict[str, bytes], two: dict[str, bytes]
) -> None:
    first, second = write(tmp_path / "1", one), write(tmp_path / "elsewhere" / "2", two, order=True)
    assert (digest_path(first) == digest_path(second)) == (one == two)


def test_a_file_has_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_path(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest() == sha256_file(tmp_path / "file")


def test_links_count_as_what_they_lead_to_and_dot_names_not_at_all(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", {"a": b"1", "d/b": b"2"})
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a").symlink_to(plain / "a")
    (linked / "d").symlink_to(plain / "d")
    (linked / ".cache").mkdir()
    (linked / ".cache" / "x").write_text("x")
    assert digest_path(plain) == digest_path(linked)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_nothing_and_an_empty_directory_are_refused(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "model")
    with pytest.raises(InputError, match="model"):
        digest_path(tmp_path / "model")


def large_settled_file(tmp_path: Path) -> Path:
    file = tmp_path / "large"
    file.write_bytes(b"a" * (2 << 20))
    os.utime(file, (time.time() - 60, time.time() - 60))
    return file


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = large_settled_file(tmp_path)
    expected = digest_path(file)
    monkeypatch.setattr(digests, "sha256_file", lambda path: pytest.fail("read again"))
    assert digest_path(file) == expected


def test_a_changed_large_file_is_read_again(tmp_path: Path) -> None:
    file = large_settled_file(tmp_path)
    before = digest_path(file)
    file.write_bytes(b"b" * (2 << 20))
    assert digest_path(file) != before == hashlib.sha256(b"a" * (2 << 20)).hexdigest()


def test_a_large_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    """It may change again within one tick of its mtime."""
    file = tmp_path / "large"
    file.write_bytes(b"a" * (2 << 20))
    digest_path(file)
    assert not (tmp_path / "cache" / "orbit" / "digests").exists()


def test_a_read_only_cache_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file-not-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file-not-folder"))
    file = large_settled_file(tmp_path)
    assert digest_path(file) == sha256_file(file)
