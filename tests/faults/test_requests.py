"""What one request to S3 promises while the network and the server do harm."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from proxy import Faults, Proxy

from orbit_core.errors import ExitCode, InputError, OrbitError
from orbit_core.store.s3 import S3Store

PUTS = ("cut_up", "cut_down", "lost", "errors")


def test_a_write_that_was_repeated_is_still_ours_and_never_wins_over_another(proxy: Proxy, store: S3Store) -> None:
    """`lost` and `cut_down`: the server has the first try, refuses the second with 412, and the object is ours."""
    for fault in PUTS:
        proxy.aim(fault, "PUT", f"/{fault}", times=1)
        assert store.put_if_absent(fault, b"mine")
        assert store.read(fault) == b"mine"
        assert sum(seen.startswith("PUT") and seen.endswith(f"/{fault}") for seen in proxy.seen) == 2
        proxy.aim(fault, "PUT", f"/{fault}", times=1)
        assert not store.put_if_absent(fault, b"mine"), "the same bytes are not the same writer"
    assert proxy.hit == [fault for fault in PUTS for _ in range(2)]


def test_of_many_whose_answers_are_lost_exactly_one_wins(proxy: Proxy, store: S3Store) -> None:
    """Every writer's first try is carried out or refused without its hearing of it."""
    for turn in range(3):
        proxy.aim("lost", "PUT", f"/goal-{turn}", times=6)
        together = threading.Barrier(6)

        def race(writer: int, turn: int = turn, together: threading.Barrier = together) -> bool:
            together.wait()
            return store.put_if_absent(f"goal-{turn}", str(writer).encode())

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(race, range(6)))
        assert sum(won) == 1
        assert store.read(f"goal-{turn}") == str(won.index(True)).encode()


BIG = bytes(range(256)) * 24


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done with gigabytes, done with a few kilobytes."""
    import moto.s3.models

    import orbit_core.store.s3 as s3

    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(s3, "UPLOAD_PART", 2000)
    monkeypatch.setattr(s3, "DOWNLOAD_PART", 700)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    (tmp_path / "large").write_bytes(BIG)
    return tmp_path / "large"


TORN = [
    ("lost", "POST", "uploads"),  # begun twice: one of the two is left for gc
    ("cut_up", "PUT", "partNumber=2"),
    ("lost", "PUT", "partNumber=2"),
    ("errors", "PUT", "partNumber=3"),
    ("cut_down", "POST", "uploadId"),
    ("lost", "POST", "uploadId"),  # completed, and the second time unknown
]


def test_a_torn_upload_in_parts_is_whole_or_absent_and_ours(
    proxy: Proxy, store: S3Store, small_parts: None, large: Path
) -> None:
    for turn, (fault, method, text) in enumerate(TORN):
        proxy.aim(fault, method, text)
        assert store.put_if_absent(f"large/{turn}", large)
        assert not store.put_if_absent(f"large/{turn}", large)
        assert store.read(f"large/{turn}") == large.read_bytes()
    assert proxy.hit == [fault for fault, _, _ in TORN]
    assert sum("partNumber=4" in seen for seen in proxy.seen) >= len(TORN)


def test_what_a_torn_upload_leaves_is_no_object_and_can_be_removed(
    proxy: Proxy, store: S3Store, small_parts: None, large: Path
) -> None:
    proxy.aim("lost", "POST", "uploads")
    store.put_if_absent("large", large)
    assert store.list() == ["large"]
    left = store.unfinished()
    assert len(left) == 1 and next(iter(left.values())) > 0
    store.remove_unfinished(next(iter(left)))
    assert store.unfinished() == {} and store.exists("large")


def test_an_answer_that_broke_off_is_never_taken_for_the_whole(
    proxy: Proxy, store: S3Store, small_parts: None, large: Path, tmp_path: Path
) -> None:
    store.put("file", large)
    for fault in ("cut_down", "lost", "errors"):
        proxy.aim(fault, "GET", "/file", times=1)
        assert store.read("file") == BIG
        proxy.aim(fault, "GET", "/file", times=3)
        store.download("file", tmp_path / fault)
        assert (tmp_path / fault).read_bytes() == BIG
        proxy.aim(fault, "GET", "/file", times=1)
        assert store.read_end("file", 1000) == BIG[-1000:]
    assert len(proxy.hit) == 15


def test_a_download_that_fails_leaves_no_file(proxy: Proxy, store: S3Store, tmp_path: Path) -> None:
    store.put("file", b"x" * 1000)
    proxy.aim("cut_down", "GET", "/file", times=10_000)
    with pytest.raises(OrbitError):
        store.patient(0.3).download("file", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_an_outage_shorter_than_the_patience_costs_time_only(proxy: Proxy, store: S3Store) -> None:
    store.put("before", b"1")
    proxy.outage(1.5)
    assert store.read("before") == b"1"
    assert store.put_if_absent("after", b"2") and store.list() == ["after", "before"]


def test_an_outage_without_end_is_said_in_time_and_may_be_retried(proxy: Proxy, store: S3Store) -> None:
    proxy.outage(3600)
    began = time.monotonic()
    with pytest.raises(OrbitError, match=r"store s3://[\s\S]*: a/b: ") as error:
        store.patient(1.0).put_if_absent("a/b", b"")
    assert time.monotonic() - began < 6
    assert not isinstance(error.value, InputError) and error.value.exit_code not in (ExitCode.REFUSED, ExitCode.DONE)


def test_a_tenth_of_all_requests_fails_and_nobody_notices(proxy: Proxy, store: S3Store) -> None:
    proxy.faults = Faults(errors=0.1, cut_up=0.05, cut_down=0.05, lost=0.1)
    written = {f"d/{n:02d}": str(n).encode() * 1000 for n in range(8)}
    for path, content in written.items():
        assert store.put_if_absent(path, content)
        assert not store.put_if_absent(path, b"second")
    assert {path: store.read(path) for path in store.list("d/")} == written
    assert len(proxy.hit) > 3
