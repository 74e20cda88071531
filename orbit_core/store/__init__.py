"""Where artifacts and rollouts live: a folder or an S3 prefix, and nothing above knows which.

A store is a flat map from relative paths (`artifacts/train/ab12.json`) to bytes. Every put is atomic and durable: a
reader sees a whole file or none, and of many writers of one path through `put_if_absent` exactly one wins. On these
two promises everything above is built: a thing made of several files becomes visible by one manifest, put last.

    store = open_store(".orbit")            # a folder, made on the first write
    store = open_store("s3://bucket/runs")  # endpoint and credentials from the usual AWS environment

Names that begin with a dot at the top of a folder store (`.tmp`, `.work`) are the store's own and never listed.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from orbit_core.errors import InputError
from orbit_core.store.base import Store
from orbit_core.store.folder import FolderStore

__all__ = ["FolderStore", "Store", "open_store", "split_url"]


def open_store(url: str | Path) -> Store:
    """The store at `url`: a folder (plain path or file://) or s3://bucket/prefix.

    Raises InputError as `split_url` does.
    """
    text = str(url)
    parts = split_url(text)
    if parts is None:
        return FolderStore(Path(text))
    if parts.scheme == "file":
        return FolderStore(Path(parts.path))
    from orbit_core.store.s3 import S3Store  # s3fs takes half a second to import

    return S3Store(parts.netloc, parts.path.strip("/"))


def split_url(text: str) -> SplitResult | None:
    """The parts of a file:// or s3:// URL, None for a plain path; nothing is opened.

    Raises InputError for other schemes and for a URL that holds credentials (they would end up in manifests and logs).
    """
    if "://" not in text:
        return None
    parts = urlsplit(text)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            f"store {parts.scheme}://...",
            "a URL without credentials or options",
            "an '@', '?' or '#' in it (not repeated here)",
            "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, or a profile, in the environment",
        )
    if parts.scheme == "s3" and not parts.netloc:
        raise InputError(f"store {text}", "s3://bucket/prefix", "no bucket")
    if parts.scheme in ("file", "s3"):
        return parts
    raise InputError(f"store {text}", "a folder or s3://bucket/prefix", f"scheme {parts.scheme!r}")
