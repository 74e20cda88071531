"""Files in the making, kept when a try dies, so that the next one goes on at the tensor where it was.

    <folder>/ledger       one line per unit of work that is done, one per file that is whole
    <folder>/NAME.part    a file that is still being filled
    <folder>/NAME         whole: nobody writes to it any more

A unit (a tensor, a module, a chunk) is written first and then recorded, so whatever a line says is there. What a killed
process has written stays in the memory of its machine; a machine that loses power loses what was not yet on the disk.
So every line counts while the machine has not been started anew, and afterwards only those whose files are whole: a
file is on the disk before the ledger calls it whole. A line that was cut off ends the ledger.

Whole files are read once more, by a second thread while the next ones are filled, for the sha256 that publishing needs;
then they are linked, not moved, to where they are to be published from, so that a try that dies while it publishes
leaves them here.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orbit_core.steps.contract import json_digest
from orbit_core.store.artifacts import code_version, make_durable
from orbit_core.store.digests import sha256_file
from orbit_core.store.folder import NO_LINKS

LEDGER, PART = "ledger", ".part"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Growing:
    """What grows in `folder`, from `begin` to `hand_over`; or up to `close`, and then in another process again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.units: dict[str, dict[str, Any]] = {}  # done, by this try or an earlier one -> what was noted about it
        self.digests: dict[str, str] = {}  # whole file -> sha256
        self._thread: ThreadPoolExecutor | None = None
        self._finishing: list[Future[None]] = []
        self._lock = threading.Lock()
        self._ledger = -1

    def begin(self, identity: Any) -> None:
        """Take over what an earlier try has left of the same thing. `identity`: JSON that says what is going to be
        made, and how; what was left of anything else is removed."""
        self._identity = json_digest([code_version(), identity])
        self._open()

    def forget(self) -> None:
        """Begin afresh: nothing of what was taken over can be used."""
        os.close(self._ledger)
        shutil.rmtree(self.folder)
        self.units, self.digests = {}, {}
        self._open()

    def part(self, file: str) -> Path:
        """Where `file` is while it grows."""
        return self.folder / f"{file}{PART}"

    def record(self, unit: str, *files: str, **facts: Any) -> None:
        """`unit` is written, to `files`, as far as it concerns us for good."""
        entry = {"unit": unit, "files": files, **facts}
        self._append(entry)
        self.units[unit] = entry

    def finish(self, file: str) -> None:
        """`file` is filled and closed; the rest is done beside what comes next."""
        for future in self._finishing:
            if future.done():
                future.result()
        self._thread = self._thread or ThreadPoolExecutor(1, "whole-files")
        self._finishing.append(self._thread.submit(self._finish, file))

    def close(self) -> None:
        """Let go; what is there stays."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        if self._ledger >= 0:
            os.close(self._ledger)
            self._ledger = -1

    def hand_over(self, directory: Path) -> None:
        """All files, whole, under their names in `directory`. Raises what the other thread has met."""
        for future in self._finishing:
            future.result()
        self.close()
        lacking = {file for entry in self.units.values() for file in entry["files"]} - set(self.digests)
        if lacking:
            raise RuntimeError(f"{self.folder}: {sorted(lacking)[0]} was written to and never finished")
        for file in self.digests:
            try:
                os.link(self.folder / file, directory / file)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                os.rename(self.folder / file, directory / file)  # the next try would have to make it again

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_over()
        self._ledger = os.open(self.folder / LEDGER, os.O_WRONLY | os.O_APPEND)

    def _finish(self, file: str) -> None:
        part = self.part(file)
        digest = sha256_file(part)
        make_durable(part)
        size = part.stat().st_size
        self._append({"file": file, "sha256": digest, "size": size})
        make_durable(self.folder / LEDGER)  # it is read by whoever comes after a power cut
        os.rename(part, self.folder / file)
        self.digests[file] = digest

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            os.write(self._ledger, line)

    def _take_over(self) -> None:
        """Read what an earlier try has left, keep what can be relied on, and begin a ledger of our own."""
        head, *entries = _lines(self.folder / LEDGER) or [{}]
        if head.get("identity") != self._identity:
            entries = []
        sizes = {entry["file"]: entry for entry in entries if "file" in entry}
        for file, entry in sizes.items():
            part, whole = self.part(file), self.folder / file
            if part.is_file() and part.stat().st_size == entry["size"] and not whole.exists():
                os.rename(part, whole)  # it died between the two
            if whole.is_file() and whole.stat().st_size == entry["size"]:
                self.digests[file] = entry["sha256"]
        boot = _boot()
        running = boot != "" and head.get("boot") == boot
        growing = {path.name.removesuffix(PART) for path in self.folder.glob(f"*{PART}")} if running else set()
        for entry in entries:
            if "unit" in entry and all(file in self.digests or file in growing for file in entry["files"]):
                self.units[entry["unit"]] = entry
        needed = {file for entry in self.units.values() for file in entry["files"]}
        kept = {LEDGER, *self.digests, *(f"{file}{PART}" for file in needed if file not in self.digests)}
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        whole_files = [entry for file, entry in sizes.items() if file in self.digests]
        lines = [{"identity": self._identity, "boot": boot}, *whole_files, *self.units.values()]
        new = self.folder / f"{LEDGER}.new"
        new.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        make_durable(new)
        os.replace(new, self.folder / LEDGER)  # not appended to: who was here before us may still hold the old one


def hand_down(old: Path, new: Path) -> None:
    """Rename a folder of unfinished files so that its last user, if it still lives and has files of it open, changes
    nothing in it any more: those files are copied. The ledger first, so that what it says is in the copies."""
    os.rename(old, new)
    for path in (new / LEDGER, *new.glob(f"*{PART}")):
        if path.exists():
            copy = path.with_name(f"{path.name}.copy")
            shutil.copyfile(path, copy)
            os.replace(copy, path)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a ledger up to the first that was cut off."""
    found: list[dict[str, Any]] = []
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return found
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        found.append(entry)
    return found


def _boot() -> str:
    """Names this start of the machine; empty where it has no name."""
    return _BOOT.read_text().strip() if _BOOT.exists() else ""
