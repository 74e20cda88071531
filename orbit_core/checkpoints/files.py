"""Files of a directory that a stranger made: regular ones that lie in it, and JSON objects in them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from orbit_core.errors import InputError

FETCH = "fetch the file again"


def regular_file(directory: Path, name: str) -> Path:
    """`directory`/`name`, refused unless it is a regular file that lies in that directory itself."""
    path = directory / name
    if not name or name in (".", "..") or Path(name).name != name or "\0" in name:
        fix = "name the files that lie beside it, without folders"
        raise InputError(f"{directory}: file name {name!r}", "a file of that directory", "it leads elsewhere", fix)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}", "a file", "nothing there", "fetch the missing file") from None
    if stat.S_ISLNK(mode):
        raise InputError(f"{path}", "a regular file", "a symbolic link", f"copy the files: cp -rL {directory} COPY")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}", "a regular file", "something else", "put the file itself there")
    return path


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of `directory`."""
    path = regular_file(directory, name)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}", "JSON", str(error), FETCH) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}", "a JSON object", type(content).__name__, FETCH)
    return content
