"""A store under an S3 prefix, through s3fs.

`put_if_absent` is a conditional write (`If-None-Match: *`), which S3 and the servers that speak its protocol decide
atomically, for single and for multipart uploads. Whole-object calls only: `with fs.open(path, "wb")` commits a partial
object when its body raises, so it is never used here.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError

from orbit_core.errors import InputError, OrbitError
from orbit_core.store.base import check_path

_CONFLICTS = {"PreconditionFailed", "412"}
_CONDITION_UNKNOWN = {"NotImplemented", "501"}


class S3Store:
    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.root = f"{bucket}/{prefix}".rstrip("/")
        self.url = f"s3://{self.root}"
        # An instance of its own, without listing caches: another process's writes must be seen at once.
        self._s3 = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)

    def read(self, path: str) -> bytes:
        with self._explained(path):
            return self._s3.cat_file(self._key(path))

    def read_end(self, path: str, size: int) -> bytes:
        with self._explained(path):
            return self._s3.cat_file(self._key(path), start=-size)

    def exists(self, path: str) -> bool:
        with self._explained(path):
            try:
                return self._s3.info(self._key(path))["type"] == "file"
            except FileNotFoundError:
                return False

    def names(self, folder: str) -> list[str]:
        with self._explained(folder):
            try:
                keys = self._s3.ls(self._key(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted(key.rpartition("/")[2] for key in keys)

    def list(self, prefix: str = "") -> list[str]:
        folder = f"{self.root}/{prefix.rpartition('/')[0]}".rstrip("/")
        with self._explained(prefix):
            try:
                keys = self._s3.find(folder)
            except FileNotFoundError:
                keys = []
        paths = (key.removeprefix(f"{self.root}/") for key in keys)
        return sorted(path for path in paths if path.startswith(prefix))

    def put_if_absent(self, path: str, source: bytes | Path, *, move: bool = False) -> bool:
        key = self._key(path)
        with self._explained(path):
            try:
                if isinstance(source, bytes):
                    self._s3.pipe_file(key, source, mode="create")
                else:
                    self._s3.put_file(str(source), key, mode="create")
            except FileExistsError:
                return False
            except (OSError, ClientError) as error:
                if _code(error) in _CONFLICTS:
                    return False
                if _code(error) in _CONDITION_UNKNOWN:
                    raise InputError(
                        f"store {self.url}",
                        "a server that supports conditional writes (If-None-Match: *)",
                        str(error),
                        "use a server that does, or a folder",
                    ) from None
                raise
        if move and isinstance(source, Path):
            source.unlink()
        return True

    def put(self, path: str, source: bytes | Path) -> None:
        with self._explained(path):
            if isinstance(source, bytes):
                self._s3.pipe_file(self._key(path), source)
            else:
                self._s3.put_file(str(source), self._key(path))

    def delete(self, path: str) -> None:
        with self._explained(path), contextlib.suppress(FileNotFoundError):
            self._s3.rm_file(self._key(path))

    def download(self, path: str, target: Path) -> None:
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with self._explained(path):
                self._s3.get_file(self._key(path), str(partial))
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def local_path(self, path: str) -> Path | None:
        return None

    def url_of(self, path: str) -> str:
        return f"s3://{self._key(path)}"

    def _key(self, path: str) -> str:
        return f"{self.root}/{check_path(path)}"

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
            if _code(error) == "NoSuchBucket":
                raise InputError(
                    f"store {self.url}", f"the bucket {self.bucket}", "no such bucket", "create it"
                ) from None
            raise
        except (OSError, BotoCoreError) as error:  # the latter: no answer from the server
            raise OrbitError(f"store {self.url}: {path}: {error}") from error


def _code(error: BaseException) -> str:
    """S3's own error code, from wherever s3fs left it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ClientError):
            return str(cause.response.get("Error", {}).get("Code", ""))
        cause = cause.__cause__
    return ""
