"""Requests to an S3 server that may be busy, cut off or away: one home for what is repeated, and for how long.

A request is repeated while the fault is one that passes (no connection, a reset, a timeout, 5xx, SlowDown, an answer
cut short) and less than `patience` seconds have gone by since its first try; then the last error is raised. Every
request is patient by itself, so one lost part of a large upload costs that part. The retries of s3fs and botocore are
off: theirs count tries, give up after seconds, and do not cover refused connections and answers that break off.

A repeated request may have been carried out before; that it does no harm is the business of whoever sends it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import s3fs
from aiohttp import ClientError as ConnectionFault
from botocore.exceptions import (
    ChecksumError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    SSLError,
)
from botocore.parsers import ResponseParserError

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two tries; doubled each time
TOLD_AFTER = 3.0  # seconds of waiting that a person should hear of
PARALLEL = 4  # parts of one file under way at once, each in memory

PASSING_FAULTS: tuple[type[Exception], ...] = (
    *(HTTPClientError, ConnectionError, IncompleteReadError, ChecksumError, ResponseParserError),
    *(ConnectionFault, TimeoutError, ConnectionResetError),
)
_PASSING_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "BadDigest", "IncompleteBody"}
_PASSING_CODES |= {"XAmzContentSHA256Mismatch", "OperationAborted"}
_log = logging.getLogger(__name__)
T = TypeVar("T")


class PatientS3(s3fs.S3FileSystem):
    """s3fs, with every request repeated as the module says. Without listing caches: what another process has written
    must be seen at once."""

    cachable = False  # by fsspec, which would not see that the environment has changed: see client_of

    def __init__(self, patience: float) -> None:
        super().__init__(
            use_listings_cache=False,
            max_concurrency=PARALLEL,
            config_kwargs={"retries": {"mode": "standard", "total_max_attempts": 1}},
        )
        self.patience = patience
        self.retries = 1  # of s3fs

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        return await self._patiently(lambda: super(PatientS3, self)._call_s3(method, *akwarglist, **kwargs))

    async def get_bytes(self, bucket: str, key: str, **how: Any) -> tuple[bytes, dict[str, Any]]:
        """The body of one object, or of the `Range` of it, with the answer's fields; never less than was announced."""

        async def once() -> tuple[bytes, dict[str, Any]]:
            answer = await super(PatientS3, self)._call_s3("get_object", Bucket=bucket, Key=key, **how)
            async with answer["Body"] as stream:
                content = await stream.read()
            if len(content) != answer["ContentLength"]:
                raise IncompleteReadError(actual_bytes=len(content), expected_bytes=answer["ContentLength"])
            return content, answer

        return await self._patiently(once)

    async def _patiently(self, request: Callable[[], Awaitable[T]]) -> T:
        began, pause, told = time.monotonic(), FIRST_PAUSE, False
        while True:
            try:
                return await request()
            except Exception as error:
                waited = time.monotonic() - began
                if not passes(error) or waited + pause > self.patience:
                    raise
                if waited > TOLD_AFTER and not told:
                    told = True
                    _log.warning("the store does not answer; waiting for up to %.0f s: %s", self.patience, error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)


def client_of(patience: float) -> PatientS3:
    """The client of this process for the AWS environment as it is now. To make one costs a tenth of a second, and a
    process opens the same store many times."""
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _client(patience, os.getpid(), environment)


@functools.lru_cache(maxsize=8)
def _client(patience: float, process: int, environment: tuple[tuple[str, str], ...]) -> PatientS3:
    return PatientS3(patience)


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    for cause in _causes(error):
        if isinstance(cause, ClientError):
            status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return code_of(cause) in _PASSING_CODES or status in (408, 429) or (status >= 500 and status != 501)
        if isinstance(cause, PASSING_FAULTS):
            return not isinstance(cause, SSLError)
    return False


def code_of(error: BaseException) -> str:
    """S3's own error code, from wherever s3fs left it."""
    for cause in _causes(error):
        if isinstance(cause, ClientError):
            return str(cause.response.get("Error", {}).get("Code", ""))
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
