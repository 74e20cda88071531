"""Hugging Face directories, read and written one tensor at a time, without transformers.

Reading  `config.json` and the headers of `*.safetensors`; a directory that is not what it says is refused here, so that
         nothing downstream has to ask. Files must lie in the directory itself: an index may not lead outside it, nor
         through links. Checkpoints that exist only as pickles are refused.
Writing  a plan first (names, dtypes, shapes), then the bytes, streaming; several shards get an index. Equal input
         gives equal bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from orbit_kernels import PackedWeight
from torch import Tensor

from orbit_core.checkpoints.architecture import Architecture
from orbit_core.checkpoints.base import Checkpoint
from orbit_core.checkpoints.files import read_json, regular_file
from orbit_core.checkpoints.scheme import checked_block
from orbit_core.checkpoints.tensorfile import (
    SafetensorsWriter,
    StoredTensor,
    TensorMeta,
    header_of,
    natural_order,
    read_safetensors,
)
from orbit_core.errors import InputError
from orbit_core.store.digests import sha256_of
from orbit_core.store.growing import Growing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
COMPANIONS = (  # what travels with the weights: everything a tokenizer or `generate` reads
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class HFCheckpoint(Checkpoint):
    """A directory with config.json and safetensors files. Opening reads headers only.

    Raises InputError: no directory or config, unsupported model_type, no safetensors (pickles are never loaded), a
    shard that is missing, truncated, linked or outside the directory, an index that disagrees with its shards.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise InputError(f"model directory {directory}", "a directory", "nothing there", "check model.path")
        if not (self.directory / "config.json").exists():
            raise InputError(f"model directory {directory}", "config.json", "no such file", "check model.path")
        self.config: dict[str, Any] = read_json(self.directory, "config.json")
        self.architecture = Architecture.from_config(self.config, str(self.directory / "config.json"))
        self.quantization_config = _quantization_config(self.config, self.directory)
        self.stored: dict[str, StoredTensor] = _open_shards(self.directory)
        self._metas = {name: self.stored[name].meta for name in natural_order(self.stored)}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        return self._metas

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return sorted({stored.file for stored in self.stored.values()})

    def tensor(self, name: str) -> Tensor:
        return self._find(name).read()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, ...]: rows of one tensor along its first dimension, nothing else read."""
        return self._find(name).rows(start, stop)

    def _find(self, name: str) -> StoredTensor:
        if name not in self.stored:
            raise InputError(
                f"{self.directory}: tensor {name}", "in the checkpoint", "missing", "fetch the model again"
            )
        return self.stored[name]


def load_packed(directory: str | Path) -> Iterator[tuple[str, PackedWeight]]:
    """(module name, PackedWeight) of every linear of an HF directory; see `base.Checkpoint`."""
    return HFCheckpoint(directory).load_packed()


class HFWriter:
    """Writes `model.safetensors`, or numbered shards and their index, into `directory`.

    plan             name -> dtype and shape of every tensor, in the order in which they fill the shards
    max_shard_bytes  a shard ends before it would exceed this; a larger tensor gets a shard of its own
    growing          where the shards grow (begun with the plan here), for a writer that goes on where a dead one was

    `add` takes whole tensors, `append` rows of one, in any order of names; memory is the caller's piece and no more.
    Used as a context manager it closes on success; on an error the half-written files stay for the caller to discard.
    """

    def __init__(
        self,
        directory: str | Path,
        plan: Mapping[str, TensorMeta],
        max_shard_bytes: int = SHARD_BYTES,
        growing: Growing | None = None,
    ) -> None:
        shards = _split(plan, max_shard_bytes)
        count = len(shards)
        numbered = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._lay_out(
            Path(directory), plan, dict(zip([SINGLE] if count == 1 else numbered, shards, strict=True)), growing
        )

    @classmethod
    def like(cls, base: HFCheckpoint, directory: Path, growing: Growing) -> HFWriter:
        """Writes the safetensors files of `base` again, every byte at its place; not the index."""
        writer = cls.__new__(cls)
        files: dict[str, list[str]] = {file.name: [] for file in base.files}
        for name, stored in sorted(base.stored.items(), key=lambda item: item[1].offset):
            files[stored.file.name].append(name)
        writer._lay_out(directory, base.metas, files, growing, {file.name: header_of(file) for file in base.files})
        return writer

    def _lay_out(
        self,
        directory: Path,
        plan: Mapping[str, TensorMeta],
        files: Mapping[str, list[str]],
        growing: Growing | None,
        headers: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self._plan, self._files, self._headers, self._growing = plan, files, headers, growing
        self._file_of = {name: file for file, names in files.items() for name in names}
        self._writers: dict[str, SafetensorsWriter] = {}
        self._filled: set[str] = set()
        if growing is not None:
            about = {name: [str(meta.dtype), *meta.shape] for name, meta in plan.items()}
            growing.begin([files, about, {file: sha256_of([raw]) for file, raw in headers.items()}])
            self._filled = set(growing.digests)

    def add(self, name: str, tensor: Tensor) -> None:
        """A whole tensor. Raises ValueError when it is not as planned."""
        if TensorMeta.of(tensor) != self._plan[name]:
            raise ValueError(f"{name}: planned {self._plan[name]}, given {TensorMeta.of(tensor)}")
        self.append(name, tensor)

    def append(self, name: str, rows: Tensor) -> None:
        """The next rows of a tensor along its first dimension."""
        file = self._file_of[name]
        if file not in self._filled:  # else by an earlier try, whose record of it was lost
            self._writer(file).append(name, rows)

    def has(self, unit: str, names: Iterable[str]) -> bool:
        """Whether an earlier try has written the tensors `names` and recorded them as `unit`: they count then."""
        if self._growing is None or unit not in self._growing.units:
            return False
        names = list(names)
        for name in names:
            if self._file_of[name] not in self._filled:
                self._writer(self._file_of[name]).skip(name)
        self._finish_filled(names)
        return True

    def record(self, unit: str, names: Iterable[str], **facts: Any) -> None:
        """The tensors `names` are written: whoever comes after a crash need not write them again."""
        if self._growing is not None:
            names = list(names)
            self._growing.record(unit, *sorted({self._file_of[name] for name in names}), **facts)
            self._finish_filled(names)

    def close(self) -> None:
        """Make everything durable. Raises ValueError when planned rows never came."""
        for file in self._files:
            if file not in self._filled:
                self._finish(file)
        if self._growing is not None:
            self._growing.hand_over(self.directory)
        if len(self._files) > 1 and not self._headers:
            index = {
                "metadata": {"total_size": sum(meta.nbytes for meta in self._plan.values())},
                "weight_map": {name: self._file_of[name] for name in sorted(self._plan)},
            }
            write_json(self.directory / INDEX, index)

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        for writer in self._writers.values():
            writer.abort()
        if self._growing is not None:
            self._growing.close()

    def _writer(self, file: str) -> SafetensorsWriter:
        if file not in self._writers:
            growing = self._growing
            path = self.directory / file if growing is None else growing.part(file)
            plan = {name: self._plan[name] for name in self._files[file]}
            header = self._headers.get(file, b"")
            self._writers[file] = SafetensorsWriter(path, plan, {"format": "pt"}, growing is not None, header)
        return self._writers[file]

    def _finish_filled(self, names: Iterable[str]) -> None:
        for file in {self._file_of[name] for name in names} - self._filled:
            if self._writer(file).is_filled:
                self._finish(file)

    def _finish(self, file: str) -> None:
        writer = self._writer(file)
        writer.close(durable=self._growing is None)
        if self._growing is not None:
            self._growing.finish(file)
        del self._writers[file]
        self._filled.add(file)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer files and generation_config.json; returns the names that there were."""
    names = [name for name in COMPANIONS if (source / name).exists()]
    for name in names:
        shutil.copyfile(regular_file(source, name), target / name)
    return names


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantization_config(config: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """From config.json, or from `hf_quant_config.json` where ModelOpt puts it."""
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None and (directory / "hf_quant_config.json").exists():
        found = read_json(directory, "hf_quant_config.json")
        about = found.get("quantization", {})
        found = {"quant_method": "modelopt", **about} if isinstance(about, dict) else about
    return checked_block(found, str(directory / "config.json"))


def _open_shards(directory: Path) -> dict[str, StoredTensor]:
    if (directory / INDEX).exists():
        return _open_index(directory)
    if (directory / SINGLE).exists():
        return read_safetensors(directory, SINGLE)
    names = sorted(path.name for path in directory.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        raise InputError(f"model directory {directory}", f"{SINGLE} or {INDEX}", "shards without an index", "fetch it")
    if any(name.endswith(_PICKLES) for name in names):
        fix = "convert the weights to safetensors; pickles are not loaded"
        raise InputError(f"model directory {directory}", "safetensors files", "only pickled weights", fix)
    raise InputError(f"model directory {directory}", SINGLE, "no weights", "check model.path")


def _open_index(directory: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{directory / INDEX}", "a weight_map of names to files", "none", "fetch the index again")
    shards = {file: read_safetensors(directory, file) for file in sorted(set(weight_map.values()))}
    for file, tensors in shards.items():
        unlisted = [name for name in tensors if weight_map.get(name) != file]
        if unlisted:
            where = f"{directory / file}: tensor {unlisted[0]}"
            raise InputError(where, "listed for this file in the index", "not so", "fetch the index again")
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise InputError(f"{directory / INDEX}: tensor {name}", f"in {file}", "not there", "fetch the shard again")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _split(plan: Mapping[str, TensorMeta], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, meta in plan.items():
        if shards[-1] and size + meta.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += meta.nbytes
    return shards
