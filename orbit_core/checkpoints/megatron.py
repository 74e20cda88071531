"""HF -> Megatron `torch_dist` -> HF, byte for byte, and a Megatron checkpoint read under its HF names.

    to_megatron(hf_dir, out_dir)              what the convert step does
    to_hf(megatron_dir, out_dir, like=hf_dir) back; config and tokenizer come from `like`
    MegatronCheckpoint(dir)                   the same interface as HFCheckpoint: load_packed(), load_plain(), tensor()

Names of keys: layout.py. How rows are fused: fusion.py. Files: torch_dist.py. All of it is in `orbit.json`, the index
that the reader trusts; a torch_dist checkpoint without one (written by a training job) is not read here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from orbit_core.checkpoints.architecture import Architecture
from orbit_core.checkpoints.base import Checkpoint
from orbit_core.checkpoints.files import read_json, regular_file
from orbit_core.checkpoints.fusion import Fusion
from orbit_core.checkpoints.hf import SHARD_BYTES, HFCheckpoint, HFWriter, copy_companions
from orbit_core.checkpoints.layout import Chunk, MegatronTensor, plan, rows_of
from orbit_core.checkpoints.quantization import precision_of
from orbit_core.checkpoints.scheme import checked_block
from orbit_core.checkpoints.tensorfile import PIECE, StoredTensor, TensorMeta, as_bytes, natural_order
from orbit_core.checkpoints.torch_dist import FILE_BYTES, dtype_from, meta_to_json, write_chunks
from orbit_core.errors import InputError
from orbit_core.store.growing import Growing

INDEX = "orbit.json"
VERSION = 1
Progress = Callable[[int, int, str], None]


def _silent(done: int, total: int, name: str) -> None:
    return None


def to_megatron(
    hf_dir: str | Path,
    out_dir: str | Path,
    progress: Progress = _silent,
    max_file_bytes: int = FILE_BYTES,
    growing: Growing | None = None,
) -> dict[str, Any]:
    """Write a torch_dist checkpoint of a HF directory into the empty directory `out_dir`; returns facts about it.

    With `growing` it goes on at the chunk where a try that died was.

    Raises InputError when a tensor has no place, a shape contradicts the config, or parts cannot be fused losslessly.
    """
    source, out = HFCheckpoint(hf_dir), Path(out_dir)
    formats, _ = precision_of(source)
    out.mkdir(parents=True, exist_ok=True)
    tensors = plan(source.architecture, source.metas, _check_linears(source))

    def pieces(chunk: Chunk) -> Iterator[memoryview]:
        parts = [source.stored[name] for name in chunk.parts]
        if sum(part.meta.nbytes for part in parts) < PIECE or chunk.fusion.kind not in ("copy", "rows"):
            yield as_bytes(chunk.fusion.fuse([part.read() for part in parts]))
            return
        for position, start, stop in chunk.fusion.order(chunk.shape):
            yield from map(as_bytes, parts[position].pieces(start, stop))

    places = write_chunks(out, tensors, pieces, progress, max_file_bytes, growing)
    names = sorted({spec.name for spec in formats.values()} - {"bf16"}) or ["bf16"]
    refined = sum(c.fusion.grid != c.fusion.block for t in tensors.values() for c in t.chunks)
    facts = {
        "format": "+".join(names),
        "tensors": len(tensors),
        "bytes": sum(tensor.meta.nbytes for tensor in tensors.values()),
        "refined_scales": refined,
    }
    index = {
        "version": VERSION,
        "layout": "megatron-core torch_dist",
        "format": facts["format"],
        "architecture": source.architecture.to_json(),
        "quantization_config": source.quantization_config,
        "tensors": {key: _tensor_to_json(tensor, places[key]) for key, tensor in tensors.items()},
    }
    (out / INDEX).write_text(json.dumps(index, separators=(",", ":"), ensure_ascii=False), encoding="utf-8")
    return facts


def to_hf(
    megatron_dir: str | Path,
    out_dir: str | Path,
    like: str | Path,
    progress: Progress = _silent,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the HF directory that a Megatron checkpoint was made of: same names, dtypes and bytes of every tensor.

    `like` is a HF directory that gives config.json, tokenizer and generation_config; its tensors are not read.
    """
    source, out, like = MegatronCheckpoint(megatron_dir), Path(out_dir), Path(like)
    wanted = Architecture.from_config(read_json(like, "config.json"), str(like / "config.json"))
    if wanted != source.architecture:
        raise InputError(
            f"config of {like}",
            f"the model of {megatron_dir}: {source.architecture}",
            str(wanted),
            "give the directory that was converted",
        )
    with HFWriter(out, source.metas, max_shard_bytes) as writer:
        for done, name in enumerate(source.metas):
            progress(done, len(source.metas), name)
            writer.add(name, source.tensor(name))
    shutil.copyfile(regular_file(like, "config.json"), out / "config.json")
    copy_companions(like, out)


@dataclass(frozen=True)
class _Stored:
    """A chunk of orbit.json: its raw bytes and how they come apart."""

    bytes: StoredTensor  # of the fused shape, without the expert axis
    parts: tuple[str, ...]
    fusion: Fusion


class MegatronCheckpoint(Checkpoint):
    """A torch_dist directory with orbit.json, its tensors un-fused and named as in HF.

    Raises InputError for a directory without orbit.json, an index that contradicts itself or its files.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / INDEX).exists():
            fix = "make the checkpoint with the convert step; others are not read"
            raise InputError(f"Megatron checkpoint {directory}", INDEX, "no such file", fix)
        index = read_json(self.directory, INDEX)
        where = str(self.directory / INDEX)
        if index.get("version") != VERSION:
            raise InputError(f"{where}: version", str(VERSION), repr(index.get("version")), "convert again")
        try:
            self.architecture = Architecture.from_json(index["architecture"], where)
            self.quantization_config = checked_block(index["quantization_config"], where)
            self._chunks = {key: _chunks_from_json(self.directory, entry) for key, entry in index["tensors"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            fix = "convert again"
            raise InputError(where, "the index that convert writes", f"{type(error).__name__}: {error}", fix) from None
        self._home: dict[str, tuple[_Stored, int]] = {}
        metas: dict[str, TensorMeta] = {}
        for chunk in (chunk for chunks in self._chunks.values() for chunk in chunks):
            shapes = chunk.fusion.part_shapes(chunk.bytes.meta.shape, len(chunk.parts))
            for position, (name, shape) in enumerate(zip(chunk.parts, shapes, strict=True)):
                if name in metas:
                    raise InputError(where, f"each tensor once, also {name}", "twice", "convert again")
                metas[name] = TensorMeta(chunk.bytes.meta.dtype, shape)
                self._home[name] = (chunk, position)
        self._metas = {name: metas[name] for name in natural_order(metas)}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        return self._metas

    def keys(self) -> list[str]:
        """Megatron keys, in the order of the files."""
        return list(self._chunks)

    def tensor(self, name: str) -> Tensor:
        """One HF tensor; of the fused tensor that it is part of, only its own rows are read."""
        if name not in self._home:
            raise InputError(f"{self.directory}: tensor {name}", "in the checkpoint", "missing", "convert again")
        chunk, position = self._home[name]
        if chunk.fusion.kind == "copy":
            return chunk.bytes.read()
        return chunk.fusion.part(position, chunk.bytes.rows)

    def fused(self, key: str, expert: int = 0) -> Tensor:
        """A Megatron tensor as stored (of one expert, where the key has an expert axis)."""
        return self._chunks[key][expert].bytes.read()


def _check_linears(source: HFCheckpoint) -> dict[str, int]:
    """Every linear's stored tensors against config.json; returns module -> rows of a scale, for block FP8."""
    rows: dict[str, int] = {}
    for module, spec in source.formats().items():
        expected = rows_of(source.architecture, module)
        weight = next(s for s in ("weight_packed", "weight") if f"{module}.{s}" in source.metas)
        meta = source.metas[f"{module}.{weight}"]
        if expected is not None and meta.shape[:1] != (expected,):
            raise InputError(
                f"tensor {module}.{weight}",
                f"{expected} rows, as config.json says",
                str(meta.shape),
                "fetch the model again",
            )
        if spec.name == "fp8":
            rows[module] = source.scale_rows(module)
    return rows


def _tensor_to_json(tensor: MegatronTensor, places: list[dict[str, Any]]) -> dict[str, Any]:
    chunks = []
    for chunk, place in zip(tensor.chunks, places, strict=True):
        fusion = {key: value for key, value in asdict(chunk.fusion).items() if value}
        entry = {**place, "parts": list(chunk.parts), "shape": list(chunk.shape), "fusion": fusion}
        chunks.append(entry if chunk.expert is None else {"expert": chunk.expert, **entry})
    return {**meta_to_json(tensor.meta), "chunks": chunks}


def _chunks_from_json(directory: Path, entry: Mapping[str, Any]) -> list[_Stored]:
    dtype, chunks = dtype_from(entry["dtype"]), []
    sizes: dict[str, int] = {}
    for chunk in entry["chunks"]:
        file = regular_file(directory, chunk["file"])
        size = sizes.setdefault(chunk["file"], file.stat().st_size)
        offset, length = chunk["bytes"]
        meta = TensorMeta(dtype, tuple(chunk["shape"]))
        if not all(type(number) is int for number in (offset, length, *meta.shape)):
            raise ValueError(f"bytes {chunk['bytes']} of shape {chunk['shape']}")
        if min(offset, length, *meta.shape, 0) < 0 or offset + length > size or length != meta.nbytes:
            raise InputError(f"{file}", f"{meta.nbytes} bytes at {offset}", f"{size} bytes in all", "convert again")
        fusion = Fusion(**{**chunk["fusion"], "rows": tuple(chunk["fusion"].get("rows", ()))})
        shapes = fusion.part_shapes(meta.shape, len(chunk["parts"]))
        if len(shapes) != len(chunk["parts"]) or fusion.fused_shape(shapes) != meta.shape:
            raise ValueError(f"parts {shapes} of {meta.shape}")
        chunks.append(_Stored(StoredTensor(file, offset, meta), tuple(chunk["parts"]), fusion))
    return chunks
