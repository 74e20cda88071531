"""How much the footer of a Parquet file says that there is, read by a process of its own.

pyarrow's metadata of row groups and columns ends the process on some damaged footers: a C++ exception that it does not
catch. The process that does it here lives as long as ours and is started again when it was ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orbit_core.other_process import python_command

_PROGRAM = "from orbit_core.data.parquet_footer import answer; answer()"


@dataclass(frozen=True)
class Footer:
    """`values`: of the columns together, or rows if those are more; `packed`: bytes before compression."""

    values: int
    packed: int


class _Reader:
    """The other process. Its pipes are its life: it ends when ours does."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), 0
        self._process: subprocess.Popen[str] | None = None

    def ask(self, path: Path) -> str:
        """Its line about `path`; empty if it was ended by what it read."""
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(os.path.abspath(path)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            if not line:
                self._process.wait()
            return line

    def _start(self) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            python_command(_PROGRAM),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )


_reader = _Reader()


def footer_of(path: Path) -> Footer:
    """Raises ValueError for a footer that is damaged."""
    line = _reader.ask(path)
    if not line:
        raise ValueError("the footer contradicts itself")
    reply = json.loads(line)
    if isinstance(reply, str):
        raise ValueError(reply)
    return Footer(*reply)


def answer() -> None:
    """In the other process: a line for each path that comes."""
    for line in sys.stdin:
        try:
            reply: list[int] | str = _totals(pq.read_metadata(json.loads(line)))
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            reply = str(error)[:300]
        print(json.dumps(reply), flush=True)


def _totals(metadata: pq.FileMetaData) -> list[int]:
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    values = sum(group.column(index).num_values for group in groups for index in range(group.num_columns))
    return [max(metadata.num_rows, values), sum(group.total_byte_size for group in groups)]
