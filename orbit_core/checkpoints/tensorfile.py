"""Bytes of tensors in files: where each lies, rows of one at a time, and a safetensors writer that streams.

A safetensors file is a little-endian u64 header length, a JSON header {name: {dtype, shape, data_offsets}} and the
bytes. Reading is pread into fresh memory: no mmap whose pages outlive a tensor, nothing unpickled, no more than the
rows asked for. Writing needs every shape beforehand, so it starts from a plan; then tensors come in any order, and the
rows of one tensor in as many pieces as one likes. Equal plans and values give equal files, byte for byte.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orbit_core.checkpoints.files import FETCH, regular_file
from orbit_core.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 20  # bytes that pass at a time: the processor's cache holds them, and larger writes cost Linux more
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_SIZE, _MAX_DIMENSIONS = 2**63 - 1, 64  # of torch


@dataclass(frozen=True)
class TensorMeta:
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        return cls(tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose bytes lie contiguously, row-major, at `offset` of `file`."""

    file: Path
    offset: int
    meta: TensorMeta

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        return self._read(self.meta.shape, self.offset)

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, ...]: rows along the first dimension."""
        if not 0 <= start <= stop <= self.meta.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {self.meta.shape[0]}")
        return self._read((stop - start, *self.meta.shape[1:]), self._start_of(start))

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The rows start:stop in turn, at most PIECE bytes at a time and one row at least; what has no rows is one
        piece. All are read into the same memory: a piece is gone when the next one is asked for."""
        if not self.meta.shape:
            yield self.read()
            return
        stop = self.meta.shape[0] if stop is None else stop
        row_bytes = self._start_of(1) - self._start_of(0)
        step = max(1, min(stop - start, PIECE // max(row_bytes, 1)))
        memory = torch.empty((step, *self.meta.shape[1:]), dtype=self.meta.dtype)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self._start_of(start))
            for first in range(start, stop, step):
                rows = memory[: stop - first]
                self._fill(file, as_bytes(rows))
                yield rows

    def matrix(self, width: int) -> StoredTensor:
        """The same bytes as a matrix [-1, width]."""
        count = math.prod(self.meta.shape) // width
        return StoredTensor(self.file, self.offset, TensorMeta(self.meta.dtype, (count, width)))

    def _start_of(self, row: int) -> int:
        return self.offset + row * math.prod(self.meta.shape[1:]) * self.meta.dtype.itemsize

    def _read(self, shape: tuple[int, ...], offset: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self.meta.dtype)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(offset)
            self._fill(file, as_bytes(tensor))
        return tensor

    def _fill(self, file: FileIO, memory: memoryview) -> None:
        """The next bytes of `file`, as many as `memory` holds."""
        done = 0
        while done < len(memory):
            count = file.readinto(memory[done:])
            if not count:
                found = f"{done}: truncated"
                raise InputError(f"{self.file}", f"{len(memory)} bytes at {file.tell() - done}", found, FETCH)
            done += count


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_safetensors(directory: Path, name: str) -> dict[str, StoredTensor]:
    """All tensors of one safetensors file, in the order of their bytes; only the header is read.

    Raises InputError for a file that is truncated, has bytes that belong to nothing, or a header that contradicts
    itself.
    """
    path = regular_file(directory, name)
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or 8 + length > size:
            raise InputError(f"{path}", "a whole safetensors file", f"{size} bytes: truncated", FETCH)
        if length > _MAX_HEADER:
            raise InputError(f"{path}", "a safetensors header", f"a header of {length} bytes", FETCH)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = [_entry(key, e) for key, e in header.items() if key != "__metadata__"]
        entries.sort(key=lambda entry: entry[2])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{path}", "a safetensors header", f"{type(error).__name__}: {error}"[:300], FETCH) from None
    base, position, tensors = 8 + length, 0, {}
    for key, meta, (start, stop) in entries:
        if start != position:
            expected = f"bytes from {position} on, without gap or overlap"
            raise InputError(f"{path}: tensor {key}", expected, f"bytes {start}:{stop}", FETCH)
        if stop - start != meta.nbytes:
            expected = f"{meta.nbytes} bytes for {meta.shape}"
            raise InputError(f"{path}: tensor {key}", expected, f"{stop - start}", FETCH)
        position = stop
        tensors[key] = StoredTensor(path, base + start, meta)
    if base + position != size:
        state = "truncated" if base + position > size else "too long"
        raise InputError(f"{path}", f"{base + position} bytes", f"{size}: {state}", FETCH)
    return tensors


def header_of(path: Path) -> bytes:
    """The raw bytes before the first tensor of a file that `read_safetensors` has read."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        return prefix + file.read(struct.unpack("<Q", prefix)[0])


def _to_entry(meta: TensorMeta, start: int, end: int) -> dict[str, Any]:
    return {"dtype": NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}


def _entry(key: str, entry: Any) -> tuple[str, TensorMeta, tuple[int, int]]:
    """One tensor of a header: name, dtype and shape, first and last byte. ValueError and the like for anything else."""
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {key}: shape of {type(shape).__name__}")
    for number in (*shape, start, stop):
        if type(number) is not int or not 0 <= number <= _MAX_SIZE:
            raise ValueError(f"tensor {key}: shape {shape}, bytes {start}:{stop}")
    return key, TensorMeta(DTYPES[entry["dtype"]], tuple(shape)), (start, stop)


class SafetensorsWriter:
    """Fills one planned file; `path` exists from the start and is whole only after `close`.

    With `again` the file may be there, begun by a process that had the same plan: what it holds is kept, and `skip`
    says which of it counts. With `header`, the raw bytes before the first tensor, the file is laid out as that says,
    and the plan is in the order of the bytes.
    """

    def __init__(
        self,
        path: Path,
        plan: Mapping[str, TensorMeta],
        metadata: Mapping[str, str],
        again: bool = False,
        header: bytes = b"",
    ) -> None:
        # widest dtype first, as the safetensors library does: every tensor is aligned to its own width
        names = list(plan) if header else sorted(plan, key=lambda name: (-plan[name].dtype.itemsize, name))
        ends = list(itertools.accumulate(plan[name].nbytes for name in names))
        starts = [0, *ends][: len(names)]
        if not header:
            entries = {name: _to_entry(plan[name], *span) for name, *span in zip(names, starts, ends, strict=True)}
            about = {"__metadata__": dict(sorted(metadata.items())), **entries}
            raw = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
            raw += b" " * (-len(raw) % 8)
            header = struct.pack("<Q", len(raw)) + raw
        self._path = path
        self._ends = {name: len(header) + end for name, end in zip(names, ends, strict=True)}
        self._next = {name: len(header) + start for name, start in zip(names, starts, strict=True)}
        self._plan = dict(plan)
        self._left = ends[-1] if ends else 0  # bytes still to come
        mode = "r+b" if again and path.exists() else "xb"
        self._file = open(path, mode, buffering=0)  # noqa: SIM115 - closed by close()
        self._file.write(header)
        self._file.truncate(len(header) + self._left)

    def append(self, name: str, rows: Tensor) -> None:
        """The next rows of tensor `name` (all of them, if one likes)."""
        meta, found = self._plan[name], TensorMeta.of(rows)
        start, room = self._next[name], self._ends[name] - self._next[name]
        fits = found.dtype == meta.dtype and found.shape[1:] == meta.shape[1:] and found.nbytes <= room
        if not fits or rows.dim() != len(meta.shape):
            raise ValueError(f"{name}: planned {meta} with {room} bytes to come, given {found}")
        view = as_bytes(rows.contiguous())
        self._file.seek(start)
        done = 0
        while done < len(view):
            done += self._file.write(view[done : done + PIECE])
        self._next[name] = start + found.nbytes
        self._left -= found.nbytes

    def skip(self, name: str) -> None:
        """All of tensor `name` is in the file already."""
        self._left -= self._ends[name] - self._next[name]
        self._next[name] = self._ends[name]

    @property
    def is_filled(self) -> bool:
        """Whether every planned byte has come."""
        return self._left == 0

    def close(self, durable: bool = True) -> None:
        """Make the file durable. Raises ValueError when planned rows never came."""
        missing = [name for name, position in self._next.items() if position != self._ends[name]]
        if missing:
            raise ValueError(f"{self._path}: {len(missing)} tensors are not whole, first {missing[0]}")
        if durable:
            os.fsync(self._file.fileno())
        self._file.close()

    def abort(self) -> None:
        """Let go of a file that will not be finished."""
        self._file.close()


def natural_order(names: Iterable[str]) -> list[str]:
    """Sorted so that layer 2 comes before layer 10."""
    return sorted(names, key=lambda name: [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")])
