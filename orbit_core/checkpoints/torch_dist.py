"""A `torch_dist` checkpoint on disk: torch.distributed.checkpoint (DCP) files as Megatron-Core writes and reads them.

    __0_N.distcp    one torch.save archive per chunk, back to back
    .metadata       DCP's index: a pickle, by DCP's design
    common.pt       what Megatron-Core keeps beside tensors; metadata.json: which format this is
    orbit.json      our index: every chunk's parts, fusion, dtype and the place of its raw bytes

The pickles are written for Megatron and never read here: an archive stores its tensor as one uncompressed record, and
orbit.json says where that record lies, so reading is a seek and needs no unpickler at all. The archive is torch's, made
around a hole into which the bytes of the parts then pass, a piece at a time. Nothing in the files depends on time or
place, so equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from orbit_core.checkpoints.layout import Chunk, MegatronTensor
from orbit_core.checkpoints.tensorfile import TensorMeta
from orbit_core.store.growing import Growing

FILE_BYTES = 5 * 10**9
_RECORD = "archive/data/0"
# Of a zip file (APPNOTE.TXT 4.3): where lengths and checksums stand in what surrounds an entry's bytes.
_LOCAL_HEADER, _CENTRAL_HEADER = 30, 46  # bytes before the name; in the first its length and the extra field's, at 26
_CENTRAL_CRC, _DESCRIPTOR = 16, b"PK\x07\x08"  # the checksum's place; behind the bytes, right before the checksum


def write_chunks(
    directory: Path,
    tensors: Mapping[str, MegatronTensor],
    pieces: Callable[[Chunk], Iterable[memoryview]],
    progress: Callable[[int, int, str], None],
    max_file_bytes: int = FILE_BYTES,
    growing: Growing | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Write all chunks, each the bytes that `pieces` gives in turn, and DCP's metadata. Returns key -> per chunk {file,
    archive: [offset, length], bytes: [offset, length]} for orbit.json. With `growing` it goes on at the chunk where a
    try that died was."""
    chunks = {f"{key} {i}": chunk for key, tensor in tensors.items() for i, chunk in enumerate(tensor.chunks)}
    files = _ChunkFiles(directory, chunks, max_file_bytes, growing)
    places: dict[str, list[dict[str, Any]]] = {}
    try:
        for done, (key, tensor) in enumerate(tensors.items()):
            progress(done, len(tensors), key)
            places[key] = [
                files.places.get(unit) or files.write(unit, tensor.meta.dtype, pieces(chunks[unit]))
                for unit in (f"{key} {i}" for i in range(len(tensor.chunks)))
            ]
        files.hand_over()
    finally:
        files.close()
    _write_metadata(directory, tensors, places)
    return places


class _ChunkFiles:
    """`__0_N.distcp` one after the other, each filled from its beginning to its end. `places`: unit -> where it is."""

    def __init__(
        self, directory: Path, chunks: Mapping[str, Chunk], max_file_bytes: int, growing: Growing | None
    ) -> None:
        self._directory, self._chunks, self._max_bytes, self._growing = directory, chunks, max_file_bytes, growing
        self.places: dict[str, dict[str, Any]] = {}
        self._number = 0
        self._file: IO[bytes] | None = None
        if growing is not None:
            growing.begin([max_file_bytes, [[unit, repr(chunk)] for unit, chunk in chunks.items()]])
            if list(growing.units) != list(chunks)[: len(growing.units)]:  # something between was lost
                growing.forget()
            self.places = {unit: entry["place"] for unit, entry in growing.units.items()}
            self._go_on()

    def write(self, unit: str, dtype: torch.dtype, pieces: Iterable[memoryview]) -> dict[str, Any]:
        """Append one chunk; returns its place."""
        if self._file is None:
            self._file = open(self._path(), "x+b")  # noqa: SIM115
        hollow = torch.empty(self._chunks[unit].sizes, dtype=dtype)
        place = {"file": self._name(), **_write_archive(self._file, hollow, pieces)}
        if self._growing is not None:
            self._file.flush()
            self._growing.record(unit, self._name(), place=place)
        if self._file.tell() >= self._max_bytes:
            self._finish()
        return place

    def hand_over(self) -> None:
        """All chunks are written."""
        if self._file is not None:
            self._finish()
        if self._growing is not None:
            self._growing.hand_over(self._directory)

    def close(self) -> None:
        """Let go, finished or not."""
        if self._file is not None:
            self._file.close()
        if self._growing is not None:
            self._growing.close()

    def _go_on(self) -> None:
        """Finish what is full, and stand where the last recorded chunk ends."""
        assert self._growing is not None
        ends = {place["file"]: sum(place["archive"]) for place in self.places.values()}
        for number, (file, end) in enumerate(ends.items()):
            self._number = number
            if file in self._growing.digests:
                self._number += 1
                continue
            self._file = open(self._path(), "r+b")  # noqa: SIM115
            self._file.truncate(end)
            self._file.seek(end)
            if end >= self._max_bytes:
                self._finish()

    def _finish(self) -> None:
        assert self._file is not None
        self._file.close()
        if self._growing is not None:
            self._growing.finish(self._name())
        self._file = None
        self._number += 1

    def _name(self) -> str:
        return f"__0_{self._number}.distcp"

    def _path(self) -> Path:
        return self._directory / self._name() if self._growing is None else self._growing.part(self._name())


class _Tail:
    """A file from byte `start` on, as a file of its own: later releases of Python refuse a zip64 archive that other
    bytes stand before."""

    def __init__(self, file: IO[bytes], start: int) -> None:
        self._file, self._start = file, start

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + (self._start if whence == 0 else 0), whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seekable(self) -> bool:
        return True


def _write_archive(file: IO[bytes], hollow: Tensor, pieces: Iterable[memoryview]) -> dict[str, Any]:
    """Append one tensor as torch.save does, and say where its raw bytes lie. `hollow` is its dtype and shape, in memory
    that nobody touches; its bytes are `pieces`.

    torch leaves room for the bytes and enters 0 as their checksum; both are filled in here. An archive that torch.save
    makes of the whole tensor differs in `.data/serialization_id`, which is torch's hash of all checksums.
    """
    start = file.tell()
    with torch.serialization.skip_data():
        torch.save(hollow, file)
    end = file.tell()
    with zipfile.ZipFile(_Tail(file, start)) as archive:
        entry, central = archive.getinfo(_RECORD), start + archive.start_dir
    header = start + entry.header_offset
    file.seek(header)
    name_length, extra_length = struct.unpack("<HH", file.read(_LOCAL_HEADER)[26:30])
    offset = header + _LOCAL_HEADER + name_length + extra_length
    written = checksum = 0
    file.seek(offset)
    for piece in pieces:
        written += file.write(piece)
        checksum = zlib.crc32(piece, checksum)
    if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size == hollow.nbytes == written:
        raise RuntimeError(f"{written} bytes for a tensor of {hollow.nbytes}; torch.save left {entry.file_size}")
    if written:
        _enter_checksum(file, checksum, offset + written, central, end)
    file.seek(end)
    return {"archive": [start, end - start], "bytes": [offset, written]}


def _enter_checksum(file: IO[bytes], checksum: int, behind: int, central: int, end: int) -> None:
    """Both places of the record's CRC-32: the descriptor behind its bytes, and the central directory central:end."""
    file.seek(behind)
    if (found := file.read(len(_DESCRIPTOR))) != _DESCRIPTOR:
        raise RuntimeError(f"torch.save wrote {found!r} behind a tensor's bytes, not {_DESCRIPTOR!r}")
    file.seek(central)
    name = central + file.read(end - central).index(_RECORD.encode())
    for position in (behind + len(_DESCRIPTOR), name - _CENTRAL_HEADER + _CENTRAL_CRC):
        file.seek(position)
        file.write(struct.pack("<I", checksum))


def _write_metadata(
    directory: Path, tensors: Mapping[str, MegatronTensor], places: Mapping[str, list[dict[str, Any]]]
) -> None:
    # DCP imports most of torch.distributed (0.7 s): only whoever writes pays for it
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, tensor in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        properties = TensorProperties(dtype=tensor.meta.dtype)
        state[key] = TensorStorageMetadata(properties, torch.Size(tensor.meta.shape), chunks)
        for index, (chunk, place) in enumerate(zip(tensor.chunks, places[key], strict=True)):
            info = _StorageInfo(place["file"], *place["archive"])
            storage[MetadataIndex(key, chunk.offsets, index)] = info
    metadata = Metadata(
        state_dict_metadata=state,
        planner_data={key: (key,) for key in tensors},
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    with open(directory / ".metadata", "xb") as file:
        pickle.dump(metadata, file, protocol=2)
    torch.save({"iteration": 0, "checkpoint_version": 3.0}, directory / "common.pt")
    about = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (directory / "metadata.json").write_text(json.dumps(about))


def dtype_from(name: str) -> torch.dtype:
    """torch dtype from the name that orbit.json carries, e.g. "float8_e4m3fn"."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    return dtype


def meta_to_json(meta: TensorMeta) -> dict[str, Any]:
    return {"dtype": str(meta.dtype).removeprefix("torch."), "shape": list(meta.shape)}
