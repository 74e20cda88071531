"""A store under an S3 prefix, through s3fs.

`put_if_absent` is a conditional write (`If-None-Match: *`), which S3 and the servers that speak its protocol decide
atomically, for single and for multipart uploads. Each carries the name of its writer, drawn for it: a server that has
done the first try and whose answer was lost refuses the second, and the name tells that the object is ours.
Whole-object calls only: `with fs.open(path, "wb")` commits a partial object when its body raises, so it is never used.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError
from fsspec.asyn import sync

from orbit_core.errors import InputError, OrbitError
from orbit_core.store.base import check_path
from orbit_core.store.requests import PARALLEL, PASSING_FAULTS, client_of, code_of

PATIENCE_SECONDS = 120.0  # that a request waits for a server that is away
UPLOAD_PART = 50 << 20  # bytes; larger where a file would need more than S3's 10,000 parts
DOWNLOAD_PART = 16 << 20
MOST_PARTS = 10_000
ROUNDS = 5  # of an upload that the server has forgotten or saw collide with another one

_PRESENT = {"PreconditionFailed", "412"}
_UNSETTLED = {"ConditionalRequestConflict", "409", "NoSuchUpload"}
_CONDITION_UNKNOWN = {"NotImplemented", "501"}
_WRITER = "orbit-writer"  # metadata of an object that was put if absent


class S3Store:
    """`patience`: seconds for which each request is repeated while the server is away."""

    def __init__(self, bucket: str, prefix: str, patience: float = PATIENCE_SECONDS) -> None:
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.root = f"{bucket}/{self.prefix}".rstrip("/")
        self.url = f"s3://{self.root}"
        self._s3 = client_of(patience)

    def patient(self, seconds: float) -> S3Store:
        return S3Store(self.bucket, self.prefix, seconds)

    def read(self, path: str) -> bytes:
        with self._explained(path):
            return self._sync(self._s3.get_bytes, self.bucket, self._key(path))[0]

    def read_end(self, path: str, size: int) -> bytes:
        with self._explained(path):
            return self._sync(self._s3.get_bytes, self.bucket, self._key(path), Range=f"bytes=-{size}")[0]

    def open(self, path: str) -> BinaryIO:
        with self._explained(path):
            file: BinaryIO = self._s3.open(f"{self.bucket}/{self._key(path)}", "rb", cache_type="none")
            return file

    def chunks(self, path: str) -> Iterator[bytes]:
        with self._explained(path):
            key = self._key(path)
            head = self._call("head_object", Key=key)
            for start in range(0, head["ContentLength"], DOWNLOAD_PART):
                yield self._sync(self._part, key, head, start)

    def exists(self, path: str) -> bool:
        return self._head(path) is not None

    def names(self, folder: str) -> list[str]:
        found: set[str] = set()
        with self._explained(folder):
            for page in self._pages(f"{self._key(folder)}/", Delimiter="/"):
                found.update(entry["Key"] for entry in page.get("Contents", []))
                found.update(entry["Prefix"].removesuffix("/") for entry in page.get("CommonPrefixes", []))
        return sorted(key.rpartition("/")[2] for key in found)

    def list(self, prefix: str = "") -> list[str]:
        return sorted(self.modified(prefix))

    def modified(self, prefix: str = "") -> dict[str, float]:
        top = f"{self.prefix}/" if self.prefix else ""
        found: dict[str, float] = {}
        with self._explained(prefix):
            for page in self._pages(top + prefix):
                for entry in page.get("Contents", []):
                    found[entry["Key"].removeprefix(top)] = entry["LastModified"].timestamp()
        return found

    def put_if_absent(self, path: str, source: bytes | Path, *, move: bool = False) -> bool:
        writer = uuid.uuid4().hex
        with self._explained(path):
            won = self._create(path, source, writer)
        if won and move and isinstance(source, Path):
            source.unlink()
        return won

    def put(self, path: str, source: bytes | Path) -> None:
        with self._explained(path):
            self._upload(path, source)

    def delete(self, path: str) -> None:
        with self._explained(path), contextlib.suppress(FileNotFoundError):
            self._call("delete_object", Key=self._key(path))

    def download(self, path: str, target: Path) -> None:
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with self._explained(path):
                self._sync(self._download, self._key(path), partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def local_path(self, path: str) -> Path | None:
        return None

    def url_of(self, path: str) -> str:
        return f"s3://{self.root}/{check_path(path)}"

    def unfinished(self) -> dict[str, float]:
        with self._explained(""):
            return {f"{key} (upload {upload})": began for key, upload, began in self._uploads()}

    def remove_unfinished(self, name: str) -> None:
        with self._explained(name), contextlib.suppress(FileNotFoundError):
            for key, upload, _ in self._uploads():
                if name == f"{key} (upload {upload})":
                    self._call("abort_multipart_upload", Key=key, UploadId=upload)

    def _create(self, path: str, source: bytes | Path, writer: str) -> bool:
        """Whether the object at `path` is the one that this call wrote."""
        for _ in range(ROUNDS):
            try:
                self._upload(path, source, mode="create", Metadata={_WRITER: writer})
                return True
            except (OSError, ClientError) as error:
                code = code_of(error)
                if code in _CONDITION_UNKNOWN:
                    raise InputError(
                        f"store {self.url}",
                        "a server that supports conditional writes (If-None-Match: *)",
                        str(error),
                        "use a server that does, or a folder",
                    ) from None
                if not isinstance(error, FileExistsError) and code not in _PRESENT | _UNSETTLED:
                    raise
                standing = self._head(path)
                if standing is not None or code not in _UNSETTLED:
                    return standing is not None and standing.get("Metadata", {}).get(_WRITER) == writer
        raise OrbitError(f"store {self.url}: {path}: {ROUNDS} uploads collided with others; run it again")

    def _upload(self, path: str, source: bytes | Path, **how: Any) -> None:
        where = f"{self.bucket}/{self._key(path)}"
        if isinstance(source, bytes):
            self._s3.pipe_file(where, source, **how)
        else:
            part = max(UPLOAD_PART, -(-source.stat().st_size // MOST_PARTS))
            self._s3.put_file(str(source), where, chunksize=part, **how)

    async def _download(self, key: str, target: Path) -> None:
        """In parts, each repeated by itself; all of one version of the object."""
        head = await self._s3._call_s3("head_object", Bucket=self.bucket, Key=key)
        size = int(head["ContentLength"])

        async def part(start: int) -> None:
            os.pwrite(file.fileno(), await self._part(key, head, start), start)

        with open(target, "wb") as file:
            step = DOWNLOAD_PART * PARALLEL
            for first in range(0, size, step):
                starts = range(first, min(first + step, size), DOWNLOAD_PART)
                await asyncio.gather(*map(part, starts))

    async def _part(self, key: str, head: dict[str, Any], start: int) -> bytes:
        """What begins at `start` of the version of the object that `head` is of."""
        end = min(start + DOWNLOAD_PART, int(head["ContentLength"]))
        how = {"Range": f"bytes={start}-{end - 1}", "IfMatch": head["ETag"]}
        content, _ = await self._s3.get_bytes(self.bucket, key, **how)
        if len(content) != end - start:
            raise OrbitError(f"store {self.url}: {key}: asked for {end - start} bytes, got {len(content)}")
        return content

    def _head(self, path: str) -> dict[str, Any] | None:
        with self._explained(path):
            try:
                return dict(self._call("head_object", Key=self._key(path)))
            except FileNotFoundError:
                return None

    def _pages(self, prefix: str, **how: str) -> Iterator[dict[str, Any]]:
        while True:
            page = self._call("list_objects_v2", Prefix=prefix, **how)
            yield page
            if not page.get("IsTruncated"):
                return
            how["ContinuationToken"] = page["NextContinuationToken"]

    def _uploads(self) -> Iterator[tuple[str, str, float]]:
        """Key, id and beginning (seconds since the epoch) of multipart uploads that were not completed."""
        top = f"{self.prefix}/" if self.prefix else ""
        marks: dict[str, str] = {}
        while True:
            page = self._call("list_multipart_uploads", Prefix=top, **marks)
            for upload in page.get("Uploads", []):
                if upload["Key"].startswith(top):
                    yield upload["Key"], upload["UploadId"], upload["Initiated"].timestamp()
            if not page.get("IsTruncated"):
                return
            marks = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _call(self, method: str, **how: Any) -> Any:
        return self._sync(self._s3._call_s3, method, Bucket=self.bucket, **how)

    def _sync(self, function: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
        return sync(self._s3.loop, function, *arguments, **how)

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{check_path(path)}".lstrip("/")

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Errors of access and addressing, said so that a person can act; a missing file stays FileNotFoundError."""
        try:
            yield
        except NoCredentialsError:
            raise InputError(
                f"store {self.url}",
                "AWS credentials",
                "none in the environment",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            ) from None
        except PermissionError as error:
            raise InputError(
                f"store {self.url}: {path or 'listing'}", "permission", str(error), "check the key's policy"
            ) from None
        except ParamValidationError as error:
            raise InputError(f"store {self.url}", "a legal bucket and key", str(error)) from None
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                raise InputError(
                    f"store {self.url}", f"the bucket {self.bucket}", "no such bucket", "create it"
                ) from None
            raise
        except (OSError, ClientError, BotoCoreError, *PASSING_FAULTS) as error:
            raise OrbitError(f"store {self.url}: {path}: {error}") from error
