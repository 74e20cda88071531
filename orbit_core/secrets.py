"""Secrets are not said: masked in whatever a run says, refused in whatever is kept.

What counts as one: user and password in a URL, the signature of a presigned URL, and the values of environment
variables whose names say so (AWS_SECRET_ACCESS_KEY, HF_TOKEN, PREFECT_API_KEY, ...). Masking is the second line: steps
take credentials from the environment alone, and none of them is meant to reach a message in the first place. A library
that prints, or an exception with the URL that failed, is why it is there.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from orbit_core.errors import InputError

MASK = "***"
SHORTEST = 8  # characters of a variable's value: shorter ones would mask words at random
_USER = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#@\"'<>]+@")
_SIGNED = re.compile(
    r"(?P<before>[?&](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|awsaccesskeyid"
    r"|signature|sig|token|access_token|api_?key|password|secret)=)[^&\s\"'<>]+",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"(?:^|_)(?:SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?|AUTH_STRING)(?:_|$)"
)
_PLACE = re.compile(r"_(?:FILE|PATH|DIR|URI|ENDPOINT)$")  # where a secret lies is none


def masked(text: str) -> str:
    """The text with every secret replaced by ***."""
    if "://" in text or "?" in text or "&" in text:
        text = _SIGNED.sub(rf"\g<before>{MASK}", _USER.sub(rf"\g<before>{MASK}@", text))
    for value in _values():
        text = text.replace(value, MASK)
    return text


def masked_all(value: Any) -> Any:
    """The same for every string inside lists and mappings but their keys; other values as they are."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {key: masked_all(item) for key, item in value.items()}
    return [masked_all(item) for item in value] if isinstance(value, list | tuple) else value


class MaskingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def refuse_secrets(value: Any, what: str) -> None:
    """Raises InputError, which does not repeat it, when a string inside `value` holds a secret."""
    for field, text in _strings(value, "", set()):
        if masked(text) == text:
            continue
        raise InputError(
            f"{what}: {field}" if field else what,
            "no credentials: it is written to manifests, and to the dashboard",
            "user and password, a signature or the value of a secret environment variable (not repeated here)",
            "give a plain path or URL; credentials come from the environment",
        )


def _strings(value: Any, field: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """(where, string) of every string in it; what YAML names many times is looked at once."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(item, f"{field}.{masked(str(key))}".lstrip("."), seen)


def _values() -> list[str]:
    """Values of secret environment variables, longest first, so that no part of one stays behind."""
    named = (value for name, value in os.environ.items() if _VARIABLE.search(name) and not _PLACE.search(name))
    return sorted({value for value in named if len(value) >= SHORTEST}, key=len, reverse=True)
