"""A store in a folder.

The bytes are written to a temporary file on the same filesystem and fsynced; `os.link` then gives them their name,
which fails if the name exists, and the directory is fsynced. A process killed at any point leaves at most a file in
`.tmp`, which nobody lists; leftovers older than a day are removed when a store is next written to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from orbit_core.errors import InputError
from orbit_core.store.base import check_path
from orbit_core.store.room import room_explained

LEFTOVER_SECONDS = 24 * 3600
CHUNK = 4 << 20  # bytes
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class FolderStore:
    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self.root = root.expanduser().absolute()
        self._temporary = self.root / ".tmp"
        self._swept = False
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"store {root}", "a folder", "a file", "name another folder")

    def read(self, path: str) -> bytes:
        return self._at(path).read_bytes()

    def read_end(self, path: str, size: int) -> bytes:
        with open(self._at(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read()

    def open(self, path: str) -> BinaryIO:
        return open(self._at(path), "rb")

    def chunks(self, path: str) -> Iterator[bytes]:
        with open(self._at(path), "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def exists(self, path: str) -> bool:
        return self._at(path).is_file()

    def names(self, folder: str) -> list[str]:
        at = self._at(folder)
        return sorted(os.listdir(at)) if at.is_dir() else []

    def list(self, prefix: str = "") -> list[str]:
        top = self.root / prefix.rpartition("/")[0]
        found = []
        for folder, folders, files in os.walk(top):
            relative = Path(folder).relative_to(self.root).as_posix()
            if relative == ".":
                folders[:] = [name for name in folders if not name.startswith(".")]
                files = [name for name in files if not name.startswith(".")]
            found += [name if relative == "." else f"{relative}/{name}" for name in files]
        return sorted(path for path in found if path.startswith(prefix))

    def modified(self, prefix: str = "") -> dict[str, float]:
        found = {}
        for path in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                # By the inode, not the bytes: a moved file was written long before it came here.
                found[path] = os.stat(self.root / path).st_ctime
        return found

    def put_if_absent(self, path: str, source: bytes | Path, *, move: bool = False) -> bool:
        target = self._at(path)
        if target.exists():
            return False
        with self._writing(path), self._durable_file(source, move) as file:
            try:
                _give_name(os.link, file, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                raise InputError(
                    f"store {self.url}",
                    "a filesystem with hard links, which make 'write only if absent' safe",
                    f"{error.strerror} when linking {path}",
                    "use a store on a local disk, NFS or S3",
                ) from None
        return True

    def put(self, path: str, source: bytes | Path) -> None:
        target = self._at(path)
        with self._writing(path), self._durable_file(source, move=False) as file:
            _give_name(os.replace, file, target)

    def delete(self, path: str) -> None:
        target = self._at(path)
        with self._writing(path), contextlib.suppress(FileNotFoundError):
            target.unlink()
        for parent in target.parents:  # empty folders mean nothing here: no clutter
            if parent == self.root:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    def download(self, path: str, target: Path) -> None:
        shutil.copyfile(self._at(path), target)

    def local_path(self, path: str) -> Path | None:
        return self._at(path)

    def patient(self, seconds: float) -> FolderStore:
        return self

    def unfinished(self) -> dict[str, float]:
        found = {}
        for file in self._temporary.iterdir() if self._temporary.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                found[f".tmp/{file.name}"] = file.stat().st_ctime
        return found

    def remove_unfinished(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def url_of(self, path: str) -> str:
        return str(self._at(path))

    def _at(self, path: str) -> Path:
        return self.root / check_path(path)

    def _writing(self, path: str) -> AbstractContextManager[None]:
        return room_explained(f"store {self.url}: {path}", self.root)

    @contextlib.contextmanager
    def _durable_file(self, source: bytes | Path, move: bool) -> Iterator[Path]:
        """A file of `source`'s bytes on the store's filesystem, fsynced, gone afterwards."""
        _make_directory(self._temporary)
        self._sweep()
        file = self._temporary / uuid.uuid4().hex
        try:
            if isinstance(source, bytes):
                file.write_bytes(source)
            elif not (move and not source.is_symlink() and _renamed(source, file)):
                shutil.copyfile(source, file)
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
            yield file
        finally:
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
        if move and isinstance(source, Path):
            source.unlink(missing_ok=True)

    def _sweep(self) -> None:
        if self._swept:
            return
        self._swept = True
        for name, begun in self.unfinished().items():
            if time.time() - begun > LEFTOVER_SECONDS:
                self.remove_unfinished(name)


def _renamed(source: Path, target: Path) -> bool:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def _give_name(how: Callable[[Path, Path], None], file: Path, target: Path) -> None:
    """Link or move `file` to `target`; durable on return. Another process may be removing the empty folder."""
    while True:
        try:
            _make_directory(target.parent)
            how(file, target)
            return _sync_directory(target.parent)
        except FileNotFoundError:
            if not file.exists():
                raise


def _make_directory(directory: Path) -> None:
    """mkdir -p whose new entries survive a power cut."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):  # not mkdir(exist_ok=True): it raises if the folder is gone again
            os.mkdir(new)
        _sync_directory(new.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
