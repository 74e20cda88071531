"""Step `quantize`: the base in the precision in which it is frozen, trained against and deployed.

An unquantised base is quantised, streaming (checkpoints/quantizer.py). A base that already lies in the requested
format - llmcompressor's W4A16, FP8 block and NVFP4, fine-grained FP8, ModelOpt's NVFP4, BF16 - is taken as it lies:
every tensor is checked, no byte of it changes, and the ignore list is the base's own. A quantised base in another
format is refused; re-quantising codes would add a second rounding to the first.

Input `base`: HF directory. Output: HF directory (config.json, *.safetensors, tokenizer files).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from orbit_kernels import FormatSpec, is_finite

from orbit_core.checkpoints.architecture import refuse_code
from orbit_core.checkpoints.base import join
from orbit_core.checkpoints.files import regular_file
from orbit_core.checkpoints.hf import COMPANIONS, INDEX, HFCheckpoint, HFWriter, copy_companions
from orbit_core.checkpoints.inventory import Inventory
from orbit_core.checkpoints.quantization import precision_of
from orbit_core.checkpoints.quantizer import Source, published, quantize_checkpoint
from orbit_core.data.encode import load_tokenizer, stop_ids
from orbit_core.errors import InputError, Interrupted
from orbit_core.memory import reuse_freed_memory
from orbit_core.recipe import Precision
from orbit_core.steps.contract import StepContext
from orbit_core.store.growing import Growing


def run(context: StepContext) -> dict[str, Any]:
    """Facts: format, group_size, quantized_modules, tensors, bytes_before, bytes_after, passed_through."""
    reuse_freed_memory()
    precision = Precision.model_validate(context.spec.params["precision"])
    base = HFCheckpoint(context.inputs["base"])
    check_companions(base)
    report = reporter(context)
    growing = Growing(context.unfinished)
    if lies_in(base, precision):
        facts = _take(base, context.output, precision, report, growing)
    else:
        take_stock(base)
        facts = quantize_checkpoint(base, context.output, precision, report, growing=growing)
    context.digests.update(growing.digests)
    return facts


def check_companions(base: HFCheckpoint) -> None:
    """What lies beside the weights: no code, a tokenizer that fits the embedding, stop tokens that exist."""
    refuse_code(base.config, f"{base.directory / 'config.json'}")
    for name in COMPANIONS:
        if (base.directory / name).is_symlink():
            regular_file(base.directory, name)
    load_tokenizer(base.directory)
    stop_ids(base.directory)


def take_stock(base: HFCheckpoint) -> None:
    """Whether an unquantised base has the tensors that its config implies. Raises InputError naming the first."""
    inventory = _inventory(base)
    for name, where in published(base):
        inventory.take(name, _shape_of(base, where))
    inventory.check_complete()


def _inventory(base: HFCheckpoint) -> Inventory:
    return Inventory(base.architecture, f"base {base.directory}", len(base.metas))


def _shape_of(base: HFCheckpoint, where: Source) -> tuple[int, ...]:
    return (where.stop - where.start, where.width) if where.width else base.metas[where.tensor].shape


def reporter(context: StepContext) -> Callable[[int, int, str], None]:
    """Progress of a step that goes through tensors: about a hundred events, and a stop on request between two."""

    def report(done: int, total: int, name: str) -> None:
        if context.should_stop():
            raise Interrupted(f"step {context.spec.step}: stopped on request before {name}; run it again")
        if done % max(1, total // 100) == 0:
            context.progress(done, total, name)

    return report


def lies_in(base: HFCheckpoint, precision: Precision) -> bool:
    """Whether the base is already in the requested precision.

    Raises InputError when it is quantised in another one, naming the first such module.
    """
    wanted = FormatSpec(precision.format, precision.group)
    if base.quantization_config is None:
        as_published = all(meta.dtype == torch.bfloat16 and len(meta.shape) < 3 for meta in base.metas.values())
        return wanted.name == "bf16" and as_published
    formats, _ = precision_of(base)
    quantized = {module: spec for module, spec in formats.items() if spec.name != "bf16"}
    for module, spec in quantized.items():
        if spec != wanted:
            raise InputError(
                f"base {base.directory}: module {module} is quantised already",
                _describe(wanted),
                _describe(spec),
                f"set precision to {_describe(spec)}, or give the unquantised model",
            )
    if not quantized:
        raise InputError(
            f"base {base.directory}",
            "quantised modules, as its quantization_config says",
            "none",
            "fetch the model again, or the config.json that belongs to it",
        )
    return True


def _take(
    base: HFCheckpoint, output: Path, precision: Precision, report: Callable[[int, int, str], None], growing: Growing
) -> dict[str, Any]:
    """Check every weight and write it again as it lies. Copies, not links: an artifact must not change when somebody
    rewrites the base in place."""
    linears, modules, inventory = set(base.linears()), base.modules(), _inventory(base)
    with HFWriter.like(base, output, growing) as writer:
        for done, (module, suffixes) in enumerate(modules.items()):
            report(done, len(modules), module)
            names = [join(module, suffix) for suffix in suffixes]
            if not writer.has(module, names):
                found = _take_module(base, module, names, module in linears, writer)
                writer.record(module, names, **found)
            for name, shape in growing.units[module]["shapes"].items():
                inventory.take(name, tuple(shape))
        inventory.check_complete()
    quantized = sum(unit["quantized"] for unit in growing.units.values())
    names = ["config.json", *(name for name in (INDEX, "hf_quant_config.json") if (base.directory / name).exists())]
    for name in names:
        shutil.copyfile(regular_file(base.directory, name), output / name)
    copy_companions(base.directory, output)
    size = sum(meta.nbytes for meta in base.metas.values())
    return {
        "format": precision.format,
        "group_size": precision.group,
        "quantized_modules": quantized,
        "tensors": len(base.metas),
        "bytes_before": size,
        "bytes_after": size,
        "passed_through": True,
    }


def _take_module(
    base: HFCheckpoint, module: str, names: list[str], linear: bool, writer: HFWriter
) -> dict[str, dict[str, tuple[int, ...]] | bool]:
    """Check and write the tensors of one module; returns published names and shapes, and whether it is quantised."""
    shapes: dict[str, tuple[int, ...]] = {}
    packed = base.packed(module) if linear else None
    if packed is not None:
        shapes[f"{module}.weight"] = packed.shape
        for suffix, tensor in packed.tensors.items():
            writer.add(join(module, suffix), tensor)
    for name in names:
        if packed is None or name.rpartition(".")[2] not in packed.tensors:
            shapes[name] = base.metas[name].shape
            for rows in base.stored[name].pieces():
                if not is_finite(rows):
                    fix = "the base is damaged; fetch it again"
                    raise InputError(f"tensor {name}", "finite numbers", "NaN or infinity", fix)
                writer.append(name, rows)
    return {"shapes": shapes, "quantized": packed is not None and packed.spec.name != "bf16"}


def _describe(spec: FormatSpec) -> str:
    return f"int4 with group size {spec.group_size}" if spec.name == "int4" else spec.name
