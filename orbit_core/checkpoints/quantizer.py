"""A BF16 (FP16, FP32) Hugging Face directory -> the same model with its linears in a packed format, streaming.

Rows pass through in slabs of about a million elements, so that memory stays far below the largest tensor whatever the
model's size. Rows are independent in INT4 and MXFP4 and independent per 128 in FP8. NVFP4 has one scale per tensor:
a first look takes the magnitude, over all of q/k/v and over gate/up together, because serving engines fuse those and
keep a single scale for the fused weight.

What is quantised: two-dimensional weights of the projections (and of an untied lm_head, when the ignore list lets
it); never embeddings, norms or routers. Everything else is written as BF16. Fused three-dimensional experts, as
transformers 5 keeps them in memory, are written under the published per-expert names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from orbit_kernels import FormatError, FormatSpec, PackedWeight, is_finite, quantize
from torch import Tensor

from orbit_core.checkpoints.ahead import ahead
from orbit_core.checkpoints.base import LINEARS
from orbit_core.checkpoints.hf import SHARD_BYTES, HFCheckpoint, HFWriter, copy_companions, write_json
from orbit_core.checkpoints.quantization import is_ignored, quantization_config, stored_tensors
from orbit_core.checkpoints.tensorfile import TensorMeta
from orbit_core.errors import InputError
from orbit_core.recipe import Precision
from orbit_core.store.growing import Growing

SLAB_ELEMENTS = 1 << 20
T = TypeVar("T")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_FUSED_EXPERTS = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<kind>gate_up_proj|down_proj)(\.weight)?")
_SHARED_SCALE = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj)$")  # siblings that engines fuse


@dataclass(frozen=True)
class Source:
    """Rows [start, stop) of a stored matrix: one weight of the published layout, wherever it lies.

    A fused expert tensor [experts, out, in] is read as [experts * out, in].
    """

    tensor: str
    start: int
    stop: int
    width: int  # 0 for what has no second dimension


def quantize_checkpoint(
    source: HFCheckpoint,
    directory: Path,
    precision: Precision,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    max_shard_bytes: int = SHARD_BYTES,
    growing: Growing | None = None,
) -> dict[str, Any]:
    """Write `directory` as a HF checkpoint of `source` in `precision`; returns facts about it.

    With `growing` it goes on at the weight where a try that died was.

    Raises InputError naming the tensor: a width that does not divide into groups, NaN or infinity, dtypes other than
    bf16, fp16, fp32, a base that is quantised already.
    """
    spec = FormatSpec(precision.format, precision.group)
    sources = dict(published(source))
    targets = {name: _spec_of(name, sources[name], spec, precision) for name in sources}
    made = {name: _planned(source, name, where, targets[name]) for name, where in sources.items()}
    plan = {stored: meta for metas in made.values() for stored, meta in metas.items()}
    shared = _SharedMagnitudes(source, sources, targets) if spec.name == "nvfp4" else None

    with _a_slab_a_core() as cores, HFWriter(directory, plan, max_shard_bytes, growing) as writer:
        for done, (name, where) in enumerate(sources.items()):
            progress(done, len(sources), name)
            if writer.has(name, made[name]):
                continue
            target = targets[name]
            if target is None:
                _copy_plain(source, where, name, writer)
            else:
                _pack(source, where, name, target, shared.of(name) if shared else None, writer, cores)
            writer.record(name, made[name])
    packed = [name.removesuffix(".weight") for name, target in targets.items() if target is not None]
    write_json(directory / "config.json", _config(source, spec, targets))
    copy_companions(source.directory, directory)
    return {
        "format": spec.name,
        "group_size": spec.group_size,
        "quantized_modules": len(packed) if spec.name != "bf16" else 0,
        "tensors": len(plan),
        "bytes_before": sum(meta.nbytes for meta in source.metas.values()),
        "bytes_after": sum(meta.nbytes for meta in plan.values()),
        "passed_through": False,
    }


def published(source: HFCheckpoint) -> Iterator[tuple[str, Source]]:
    """(published tensor name, where its rows lie); fused experts are taken apart.

    Raises InputError for a dtype that is not quantised from, or fused experts of another shape than the config's.
    """
    arch = source.architecture
    for name, meta in source.metas.items():
        if meta.dtype not in _FLOATS:
            raise InputError(f"tensor {name}", "bf16, fp16 or fp32", str(meta.dtype), "give an unquantised base")
        fused = _FUSED_EXPERTS.fullmatch(name)
        if fused is None or len(meta.shape) != 3:
            rows = meta.shape[0] if meta.shape else 1
            yield name, Source(name, 0, rows, meta.shape[1] if len(meta.shape) == 2 else 0)
            continue
        gate_up = fused["kind"] == "gate_up_proj"
        inner = arch.expert_intermediate
        wanted = (arch.experts, 2 * inner, arch.hidden) if gate_up else (arch.experts, arch.hidden, inner)
        if meta.shape != wanted:
            raise InputError(
                f"tensor {name}", f"shape {wanted}, by config.json", str(meta.shape), "fetch the model again"
            )
        parts = ("gate_proj", "up_proj") if gate_up else ("down_proj",)
        rows = meta.shape[1] // len(parts)
        for expert in range(arch.experts):
            for index, part in enumerate(parts):
                start = expert * meta.shape[1] + index * rows
                yield f"{fused['prefix']}.{expert}.{part}.weight", Source(name, start, start + rows, meta.shape[2])


def _spec_of(name: str, where: Source, spec: FormatSpec, precision: Precision) -> FormatSpec | None:
    """The format that a tensor is to have, or None when it stays plain."""
    module, _, suffix = name.rpartition(".")
    if suffix != "weight" or where.width == 0:
        return None
    if module.rpartition(".")[2] not in LINEARS and module != "lm_head":
        return None
    if is_ignored(module, precision.ignore):
        return None
    if spec.name in ("int4", "nvfp4", "mxfp4") and where.width % spec.group_size:
        raise InputError(
            f"tensor {name} [{where.stop - where.start}, {where.width}]",
            f"an input width divisible by {spec.name}'s group size {spec.group_size}",
            f"{where.width}",
            "choose a smaller group_size or another format, or add the module to precision.ignore",
        )
    return spec


def _planned(source: HFCheckpoint, name: str, where: Source, target: FormatSpec | None) -> dict[str, TensorMeta]:
    if target is None:
        rows = where.stop - where.start
        shape = (rows, where.width) if where.width else source.metas[where.tensor].shape
        return {name: TensorMeta(torch.bfloat16, shape)}
    module = name.removesuffix(".weight")
    shape = (where.stop - where.start, where.width)
    return {f"{module}.{suffix}": meta for suffix, meta in stored_tensors(target, shape).items()}


@contextmanager
def _a_slab_a_core() -> Iterator[int]:
    """How many slabs to work on at once: as many as torch has threads, which then has one for each of them. Most of
    what quantising does waits for memory or for Python, where whole slabs get further than parts of one."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


def _slabs(
    source: HFCheckpoint, where: Source, name: str, work: Callable[[Tensor], T], threads: int = 1
) -> Iterator[T]:
    """`work` on the rows of a weight as [n, width] pieces of its own dtype, n a multiple of 128 but for the last."""
    step = max(128, SLAB_ELEMENTS // max(where.width, 1) // 128 * 128)
    matrix = source.stored[where.tensor].matrix(where.width)

    def slab(start: int) -> T:
        rows = matrix.rows(start, min(start + step, where.stop))
        _require_finite(rows, name)
        return work(rows)

    starts = range(where.start, where.stop, step)
    yield from ahead((partial(slab, start) for start in starts), threads) if len(starts) > 1 else map(slab, starts)


def _copy_plain(source: HFCheckpoint, where: Source, name: str, writer: HFWriter) -> None:
    if where.width == 0:
        whole = source.tensor(where.tensor)
        _require_finite(whole, name)
        writer.add(name, _to_bf16(whole, name))
        return
    for rounded in _slabs(source, where, name, partial(_to_bf16, name=name)):
        writer.append(name, rounded)


def _require_finite(values: Tensor, name: str) -> None:
    if not is_finite(values):
        raise InputError(f"tensor {name}", "finite numbers", "NaN or infinity", "the base is damaged; fetch it again")


def _to_bf16(values: Tensor, name: str) -> Tensor:
    rounded = values.to(torch.bfloat16)
    if values.dtype == torch.float32 and not is_finite(rounded):
        fix = "the base is damaged; fetch it again"
        raise InputError(f"tensor {name}", "numbers that BF16 can hold", "a magnitude above 3.39e38", fix)
    return rounded


def _pack(
    source: HFCheckpoint,
    where: Source,
    name: str,
    spec: FormatSpec,
    magnitude: Tensor | None,
    writer: HFWriter,
    threads: int,
) -> None:
    """Quantise one weight slab by slab, several at once, and write its tensors."""
    module = name.removesuffix(".weight")
    shape = (where.stop - where.start, where.width)
    whole: dict[str, Tensor] = {}  # per-tensor values: written once

    def pack(slab: Tensor) -> PackedWeight:
        try:
            return _quantize_slab(slab, spec, magnitude)
        except FormatError as error:
            fix = "choose another precision.format"
            raise InputError(f"tensor {name}", f"a weight that {spec.name} can hold", str(error), fix) from None

    for packed in _slabs(source, where, name, pack, threads):
        for suffix, tensor in packed.tensors.items():
            if suffix == "weight_shape":
                whole[suffix] = torch.tensor(shape, dtype=tensor.dtype)
            elif suffix == "weight_global_scale":
                whole[suffix] = tensor
            else:
                writer.append(f"{module}.{suffix}", tensor)
    for suffix, tensor in whole.items():
        writer.add(f"{module}.{suffix}", tensor)


def _quantize_slab(slab: Tensor, spec: FormatSpec, magnitude: Tensor | None) -> PackedWeight:
    """A slab of rows. With a magnitude it carries one row more, which gives it the whole tensor's scale."""
    if magnitude is None:
        return quantize(slab, spec)
    carrier = torch.zeros(1, slab.shape[1])
    carrier[0, 0] = magnitude
    packed = quantize(torch.cat([slab.float(), carrier]), spec)
    rows = {key: tensor if key == "weight_global_scale" else tensor[:-1] for key, tensor in packed.tensors.items()}
    return PackedWeight(spec, (slab.shape[0], slab.shape[1]), rows)


class _SharedMagnitudes:
    """Largest magnitude, float32, over all weights that share an NVFP4 global scale. Read when the first of them is
    quantised: the others lie near it, so that its bytes come from the disk once."""

    def __init__(self, source: HFCheckpoint, sources: dict[str, Source], targets: dict[str, FormatSpec | None]) -> None:
        self._source, self._sources = source, sources
        self._families: dict[str, list[str]] = {}
        for name in sources:
            if targets[name] is not None:
                self._families.setdefault(_family(name), []).append(name)
        self._largest: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        family = _family(name)
        if family not in self._largest:
            largest = (
                value
                for each in self._families[family]
                for value in _slabs(self._source, self._sources[each], each, _magnitude)
            )
            self._largest[family] = torch.stack(list(largest)).amax()
        return self._largest[family]


def _magnitude(slab: Tensor) -> Tensor:
    return slab.abs().amax().float()


def _family(name: str) -> str:
    module = name.removesuffix(".weight")
    return _SHARED_SCALE.sub("", module) if _SHARED_SCALE.search(module) else module


def _config(source: HFCheckpoint, spec: FormatSpec, targets: dict[str, FormatSpec | None]) -> dict[str, Any]:
    unquantized = [
        name.removesuffix(".weight")
        for name, target in targets.items()
        if target is None and name.endswith(".weight") and _is_linear_or_router(name)
    ]
    if "lm_head.weight" not in targets:
        unquantized.append("lm_head")  # tied: readers see a Linear all the same
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "quantization_config")}
    config["dtype"] = "bfloat16"
    block = quantization_config(spec, unquantized)
    if block is not None:
        config["quantization_config"] = block
    return config


def _is_linear_or_router(name: str) -> bool:
    module = name.removesuffix(".weight")
    return module.rpartition(".")[2] in LINEARS or module == "lm_head" or module.endswith(".mlp.gate")
