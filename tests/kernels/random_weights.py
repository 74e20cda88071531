"""Packed weights of random bytes, as a checkpoint could store them: every code, under scales of every size."""

from __future__ import annotations

from dataclasses import replace

import torch
from orbit_kernels import FORMATS, FormatSpec, PackedStack, PackedWeight

FUSED = [FormatSpec("int4", 32), FormatSpec("int4", 64), FormatSpec("int4", 128)]
FUSED += [FORMATS[name] for name in ("mxfp4", "nvfp4", "fp8")]


def random_packed(spec: FormatSpec, out: int, width: int, device: str) -> PackedWeight:
    """Scales of a usual size, so that sums stay near one."""

    def octets(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, shape, device=device, dtype=torch.uint8)

    if spec.name == "int4":
        words = torch.randint(-(2**31), 2**31 - 1, (out, width // 8), dtype=torch.int32, device=device)
        scales = (torch.rand(out, width // spec.group_size, device=device) * 0.02 + 0.002).to(torch.bfloat16)
        shape = torch.tensor([out, width], device=device)
        tensors = {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}
    elif spec.name == "mxfp4":
        scales = octets(out, width // 32, low=116, high=124)
        tensors = {"weight_packed": octets(out, width // 2), "weight_scale": scales}
    elif spec.name == "nvfp4":
        scales = octets(out, width // 16, low=1, high=0x7F).view(torch.float8_e4m3fn)
        whole = torch.rand(1, device=device) * 1000 + 1000
        tensors = {"weight_packed": octets(out, width // 2), "weight_scale": scales, "weight_global_scale": whole}
    elif spec.name == "bf16":
        tensors = {"weight": torch.randn(out, width, device=device).bfloat16()}
    else:
        codes = octets(out, width)
        codes[codes & 0x7F == 0x7F] = 0  # NaN, which no weight may hold
        scales = torch.rand(-(-out // 128), -(-width // 128), device=device) * 1e-3 + 1e-4
        tensors = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scales}
    return PackedWeight(spec, (out, width), tensors)


def extremes(packed: PackedWeight) -> list[PackedWeight]:
    """The same codes under scales at both ends of what the products take, zero included, in every spelling."""
    stored, name = packed.tensors, packed.spec.name
    if name == "int4":
        scale = stored["weight_scale"].clone()
        scale[0], scale[1], scale[2] = 2.0**-126, 1e30, 0.0
        return [replace(packed, tensors=stored | {"weight_scale": scale})]
    if name == "mxfp4":
        scale = stored["weight_scale"].clone()
        for row, exponent in enumerate((0, 1, 2, 63, 127, 128, 129, 130, 192, 250, 251, 252)):
            scale[row] = exponent
        return [replace(packed, tensors=stored | {"weight_scale": scale})]
    if name == "nvfp4":
        scale = stored["weight_scale"].view(torch.uint8).clone()
        scale[0], scale[1], scale[2] = 0, 1, 0x7E
        codes = {"weight_scale": scale.view(torch.float8_e4m3fn)}
        wholes = [torch.tensor([whole], device=packed.device) for whole in (1e-25, 3e-3, 7.7, 1234.5, 3e19)]
        theirs = [stored | codes | {"weight_global_scale": whole} for whole in wholes]
        spelled = {"weight": stored["weight_packed"], **codes}
        modelopt = [spelled | {"weight_scale_2": 1 / whole} for whole in wholes]
        return [replace(packed, tensors=tensors) for tensors in theirs + modelopt]
    scale = stored["weight_scale_inv"].clone()
    scale[0, 0], scale[0, -1], scale[-1, 0] = 1e-35, 1e30, 0.0
    spelled = [{"weight_scale_inv": scale}, {"weight_scale": scale.to(torch.bfloat16)}]
    return [replace(packed, tensors={"weight": stored["weight"]} | each) for each in spelled]


def stack_of(spec: FormatSpec, out: int, width: int, count: int, device: str) -> PackedStack:
    return PackedStack.of([random_packed(spec, out, width, device) for _ in range(count)])
