"""What a store promises, on a folder and on S3 alike."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orbit_core.errors import InputError, OrbitError
from orbit_core.store import Store, open_store
from orbit_core.store.folder import LEFTOVER_SECONDS, FolderStore


def test_bytes_come_back_as_they_were_put(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x00\xff" * 1000)
    store.put("a/b.bin", b"old")
    store.put("a/b.bin", tmp_path / "file")
    assert store.read("a/b.bin") == b"\x00\xff" * 1000
    store.download("a/b.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"\x00\xff" * 1000


def test_the_first_put_if_absent_wins_and_the_second_changes_nothing(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"second")
    assert store.put_if_absent("x/y", b"first")
    assert not store.put_if_absent("x/y", b"second")
    assert not store.put_if_absent("x/y", tmp_path / "file")
    assert store.read("x/y") == b"first"


def test_a_moved_file_is_consumed_and_a_copied_one_is_not(store: Store, tmp_path: Path) -> None:
    for name in ("moved", "copied"):
        (tmp_path / name).write_text(name)
        assert store.put_if_absent(f"d/{name}", tmp_path / name, move=name == "moved")
        assert store.read(f"d/{name}") == name.encode()
    assert [(tmp_path / name).exists() for name in ("moved", "copied")] == [False, True]


def test_a_moved_link_brings_its_content(store: Store, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("content")
    (tmp_path / "link").symlink_to("real")
    store.put_if_absent("a/file", tmp_path / "link", move=True)
    assert store.read("a/file") == b"content"
    assert (tmp_path / "real").read_text() == "content"


def test_listing_is_sorted_deep_and_by_prefix(store: Store) -> None:
    for path in ("run=a/step=2/x", "run=a/step=1/y/z", "run=ab/q", "top"):
        store.put(path, b"")
    assert store.list() == ["run=a/step=1/y/z", "run=a/step=2/x", "run=ab/q", "top"]
    assert store.list("run=a/") == ["run=a/step=1/y/z", "run=a/step=2/x"]
    assert store.list("run=a/step=2") == ["run=a/step=2/x"]
    assert store.list("run=a") == ["run=a/step=1/y/z", "run=a/step=2/x", "run=ab/q"]
    assert store.list("nothing/") == []


def test_existence_is_of_files_and_ends_with_delete(store: Store) -> None:
    store.put("a/b", b"1")
    assert store.exists("a/b") and not store.exists("a") and not store.exists("a/c")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b") and store.list() == []
    with pytest.raises(FileNotFoundError):
        store.read("a/b")


def test_names_are_those_of_one_level(store: Store) -> None:
    for path in ("runs/b/deep/file", "runs/a", "runs/b/other", "elsewhere/c"):
        store.put(path, b"1")
    assert store.names("runs") == ["a", "b"]
    assert store.names("runs/b") == ["deep", "other"]
    assert store.names("nothing") == []


@pytest.mark.parametrize(("size", "found"), [(3, b"789"), (10, b"0123456789"), (99, b"0123456789")])
def test_the_end_of_a_file_is_read_alone(store: Store, size: int, found: bytes) -> None:
    store.put("a/file", b"0123456789")
    assert store.read_end("a/file", size) == found
    with pytest.raises(FileNotFoundError):
        store.read_end("a/none", size)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../up", "a/../../b", "a//b", "a/", "./a", ".tmp/x"])
def test_a_path_cannot_leave_the_store(store: Store, path: str) -> None:
    with pytest.raises(ValueError, match="not a store path"):
        store.put(path, b"")


def test_of_many_threads_exactly_one_wins(store: Store) -> None:
    together = threading.Barrier(16)

    def race(writer: int) -> bool:
        together.wait()
        return store.put_if_absent("race/goal", f"writer {writer}".encode())

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(race, range(16)))
    assert sum(won) == 1
    assert store.read("race/goal") == f"writer {won.index(True)}".encode()


RACE = """
import sys
from orbit_core.store import open_store
url, writer = sys.argv[1:]
store = open_store(url)
store.exists("warm/up")
print("ready", flush=True)
sys.stdin.readline()
print(*(int(store.put_if_absent(f"goal/{n}", writer.encode() * 100)) for n in range(20)))
"""


def test_of_many_processes_exactly_one_wins(store: Store, store_url: str) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, store_url, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    answers = [[int(bit) for bit in writer.communicate("go\n", timeout=60)[0].split()] for writer in writers]
    for goal in range(20):
        column = [answer[goal] for answer in answers]
        assert sum(column) == 1
        assert store.read(f"goal/{goal}") == str(column.index(1)).encode() * 100


KILLED = """
import os, signal, sys, threading, time
from orbit_core.store import open_store
store = open_store(sys.argv[1])
threading.Timer(float(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
print("ready", flush=True)
for n in range(100_000):
    store.put_if_absent(f"new/{n}", bytes([n % 256]) * 300_000)
    store.put("same", bytes([n % 256]) * 300_000)
"""


def test_a_writer_killed_at_any_instant_leaves_whole_files_only(tmp_path: Path) -> None:
    whole = 0
    for delay in (0.02, 0.05, 0.11, 0.23, 0.37):
        store = FolderStore(tmp_path / str(delay))
        assert subprocess.run([sys.executable, "-c", KILLED, store.url, str(delay)], stdout=-1).returncode == -9
        for path in store.list():
            content = store.read(path)
            assert len(content) == 300_000 and len(set(content)) == 1
            whole += 1
    assert whole, "every writer was killed before its first write: the test showed nothing"


def test_readers_never_see_half_an_overwritten_file(store: Store) -> None:
    store.put("file", b"a" * 200_000)
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            store.put("file", (b"a", b"b")[turn % 2] * 200_000)
            turn += 1

    writer = threading.Thread(target=write)
    writer.start()
    seen = [store.read("file") for _ in range(40)]
    stop.set()
    writer.join()
    assert all(len(content) == 200_000 and len(set(content)) == 1 for content in seen)


def test_deleting_beside_writing_loses_no_write(tmp_path: Path) -> None:
    """`delete` removes empty folders; a write into such a folder at the same moment makes it again."""
    store = FolderStore(tmp_path)

    def churn(writer: int) -> int:
        for n in range(150):
            assert store.put_if_absent(f"shared/deep/{writer}-{n}", b"1")
            store.delete(f"shared/deep/{writer}-{n}")
        return writer

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(churn, range(4))) == [0, 1, 2, 3]
    assert store.list() == []


def test_a_folder_gone_the_moment_another_writer_made_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes the folder first, so mkdir says it exists, and removes it before anything is in it."""
    store = FolderStore(tmp_path)
    real, raced = os.mkdir, []

    def mkdir(path: Path, mode: int = 0o777) -> None:
        if Path(path).name == "deep" and not raced:
            raced.append(path)
            raise FileExistsError(17, "File exists", str(path))
        real(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert store.put_if_absent("shared/deep/file", b"1")
    assert raced
    assert store.read("shared/deep/file") == b"1"


def test_leftovers_of_dead_writers_are_swept_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".tmp").mkdir()
    (tmp_path / ".tmp" / "dead").write_text("half a file")
    FolderStore(tmp_path).put("a", b"1")
    assert (tmp_path / ".tmp" / "dead").exists(), "its writer may still live"
    later = time.time() + LEFTOVER_SECONDS + 60
    monkeypatch.setattr(time, "time", lambda: later)
    FolderStore(tmp_path).put("a", b"1")
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_a_filesystem_without_links_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(InputError, match="hard links"):
        FolderStore(tmp_path).put_if_absent("a", b"1")


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket/x", "s3://hunter2@bucket", "s3://bucket/x?secret=hunter2"])
def test_a_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(InputError, match="AWS_ACCESS_KEY_ID") as refusal:
        open_store(url)
    assert "hunter2" not in str(refusal.value)


def test_other_schemes_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url in ("gs://bucket/x", "s3:///x", tmp_path / "file"):
        with pytest.raises(InputError):
            open_store(url)


def test_a_missing_bucket_is_named(s3_environment: None) -> None:
    with pytest.raises(InputError, match=r"s3://no-such-bucket/x[\s\S]*no such bucket"):
        open_store("s3://no-such-bucket/x").put_if_absent("a", b"1")


def test_missing_credentials_are_explained(s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(InputError, match="AWS credentials"):
        open_store("s3://bucket/x").read("a")


def test_large_files_go_in_parts_and_the_second_still_loses(s3_url: str, tmp_path: Path) -> None:
    store = open_store(s3_url)
    (tmp_path / "big").write_bytes(b"z" * (101 << 20))
    assert store.put_if_absent("big", tmp_path / "big")
    assert not store.put_if_absent("big", tmp_path / "big")
    store.download("big", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size == 101 << 20


def test_a_server_that_does_not_answer_is_named(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OrbitError, match=rf"store {s3_url}: a/b: Could not connect to the endpoint") as error:
        open_store(s3_url).patient(0.5).read("a/b")
    assert error.value.exit_code == 1, "it may come back"
