"""Small models of every family, written and quantised as a run would, for the tests of engines, adapters and parity."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from orbit_kernels import FormatSpec, PackedWeight, dequantize, quantize
from torch import Tensor

from orbit_core.recipe import Engines

torch.set_num_threads(1)  # tiny products: more threads only wait for one another
VOCABULARY = 40
ENGINES = Engines(threads=1)
FORMATS = ("int4", "fp8", "nvfp4", "mxfp4", "bf16")
KEPT = ("lm_head", "embed_tokens", "norm", "gate")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "eos_token_id": [1, 2], "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.08,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}


def reference(family: str = "qwen3", tied: bool = False, seed: int = 0, **sizes: Any) -> torch.nn.Module:
    """A `...ForCausalLM` of transformers with seeded random weights that BF16 holds exactly."""
    if family == "qwen3":
        from transformers.models.qwen3 import Qwen3Config as Config
        from transformers.models.qwen3 import Qwen3ForCausalLM as Model
    elif family == "qwen3_moe":
        from transformers.models.qwen3_moe import Qwen3MoeConfig as Config
        from transformers.models.qwen3_moe import Qwen3MoeForCausalLM as Model
    else:
        from transformers.models.llama import LlamaConfig as Config
        from transformers.models.llama import LlamaForCausalLM as Model
    torch.manual_seed(seed)
    extra = MOE if family == "qwen3_moe" else {}
    model = Model(Config(**{**SIZES, **extra, **sizes}, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "lm_head" in name or "gate.weight" in name:
                parameter.mul_(4)  # peaked distributions: routing and sampling have something to decide
            parameter.copy_(parameter.bfloat16().float())
    return model.requires_grad_(False)


def hf_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """BF16 tensors under the names of a published checkpoint: experts one by one."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            for e, fused in enumerate(value):
                gate, up = fused.chunk(2)
                tensors[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate.bfloat16().clone()
                tensors[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up.bfloat16().clone()
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(value):
                tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = down.bfloat16().clone()
        else:
            tensors[name] = value.bfloat16().clone()
    return tensors


def use_dequantized(model: torch.nn.Module, source: Source) -> torch.nn.Module:
    """Give the reference the values that the packed bytes stand for."""
    with torch.no_grad():
        for name, packed in source.packed_weights.items():
            dense = dequantize(packed, torch.bfloat16).float()
            owner, _, last = name.rpartition(".")
            if ".experts." in name:
                bank, _, index = owner.rpartition(".")
                experts = model.get_submodule(bank)
                width = experts.intermediate_dim
                if last == "down_proj":
                    experts.down_proj[int(index)] = dense
                else:
                    start = 0 if last == "gate_proj" else width
                    experts.gate_up_proj[int(index), start : start + width] = dense
            else:
                model.get_submodule(name).weight.copy_(dense)
    return model


@dataclass
class Source:
    """A checkpoint in memory, as `orbit_core.checkpoints` would yield it."""

    config: dict[str, Any]
    packed_weights: dict[str, PackedWeight]
    plain_tensors: dict[str, Tensor]

    def load_packed(self) -> Any:
        yield from self.packed_weights.items()

    def load_plain(self) -> Any:
        yield from self.plain_tensors.items()


def quantized(model: torch.nn.Module, fmt: str = "int4") -> Source:
    packed, plain = {}, {}
    for name, tensor in hf_tensors(model).items():
        module = name.removesuffix(".weight")
        if tensor.dim() == 2 and not any(module.endswith(kept) for kept in KEPT):
            packed[module] = quantize(tensor, FormatSpec(fmt))
        else:
            plain[name] = tensor
    return Source(model.config.to_dict(), packed, plain)


@dataclass(frozen=True)
class Prepared:
    """What the quantize and convert steps leave behind."""

    quantized: Path
    converted: Path


def prepare(model: torch.nn.Module, fmt: str, directory: Path) -> Prepared:
    """HF -> quantised HF -> Megatron, by the functions of the steps."""
    from orbit_core.checkpoints.hf import HFCheckpoint
    from orbit_core.checkpoints.megatron import to_megatron
    from orbit_core.checkpoints.quantizer import quantize_checkpoint
    from orbit_core.recipe import Precision

    base = HFCheckpoint(write_hf(model, directory / "base"))
    (directory / "quantized").mkdir()
    quantize_checkpoint(base, directory / "quantized", Precision(format=fmt))
    to_megatron(directory / "quantized", directory / "converted")
    return Prepared(directory / "quantized", directory / "converted")


def write_hf(model: torch.nn.Module, directory: Path) -> Path:
    """A BF16 HF directory."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(hf_tensors(model), directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.update(architectures=[type(model).__name__], dtype="bfloat16")
    (directory / "config.json").write_text(json.dumps(config))
    return directory
