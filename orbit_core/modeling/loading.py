"""From a checkpoint to a model that computes with its bytes.

A source is anything that yields (module name, PackedWeight) and (tensor name, tensor): the HF checkpoint for the
rollout engine, the Megatron checkpoint for the trainer. Every tensor must find its place and every place its tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from orbit_kernels import FormatSpec, PackedWeight
from torch import Tensor, nn

from orbit_core.errors import InputError
from orbit_core.modeling.families import build_skeleton, fresh_rotary
from orbit_core.modeling.layers import PackedExperts, PackedLinear, swap_in
from orbit_core.modeling.model import PackedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class WeightSource(Protocol):
    """What `orbit_core.checkpoints` opens."""

    def load_packed(self) -> Iterator[tuple[str, PackedWeight]]:
        """(HF module name, weight) of every linear."""

    def load_plain(self) -> Iterator[tuple[str, Tensor]]:
        """(HF tensor name, tensor) of everything else."""


def load_model(
    source: WeightSource,
    config: Mapping[str, Any],
    compute_dtype: str,
    device: str,
    resident_mib: int = 0,
    stack_experts: bool | None = None,
) -> PackedModel:
    """A frozen model that computes in `compute_dtype` ("float32" or "bfloat16") on `device`.

    `config` is the contents of config.json.
    Dequantised weights are kept while they fit into `resident_mib`, from the first layer on; that changes no result.
    Experts are stacked, and then computed together, where grouped products have a fast path (bfloat16 on a GPU), or as
    `stack_experts` says.
    Raises InputError naming missing and unexpected tensors, and shapes that differ from the configuration.
    """
    where, dtype = _settled(device), DTYPES[compute_dtype]
    skeleton: Any = build_skeleton(config)
    linears = swap_in(skeleton)
    tied = bool(skeleton.config.tie_word_embeddings)
    if stack_experts is None:
        stack_experts = where.type == "cuda" and dtype == torch.bfloat16
    filler = _Filler(skeleton, linears, where, dtype, tied, stack_experts)
    stored = filler.fill(source)
    fresh_rotary(skeleton, where)
    if tied:
        skeleton.lm_head.weight = skeleton.model.embed_tokens.weight
    _keep_resident(filler.alone(), dtype, resident_mib * 2**20)
    return PackedModel(skeleton, linears, stored, where, dtype)


def _settled(device: str) -> torch.device:
    """The device; a GPU becomes the current one, which is where kernels are launched.

    Raises InputError when torch sees no such GPU.
    """
    where = torch.device(device)
    if where.type == "cuda":
        index, count = where.index or 0, torch.cuda.device_count()
        if index >= count:
            fix = "set engines.device to cpu, or run where torch sees the GPU"
            raise InputError(f"engines.device {device}", "a GPU that torch can use", f"{count} of them", fix)
        torch.cuda.set_device(index)
    return where


def _keep_resident(linears: Iterable[PackedLinear], dtype: torch.dtype, budget: int) -> None:
    for module in linears:
        cost = module.in_features * module.out_features * dtype.itemsize
        if cost > budget:
            return
        budget -= module.keep_resident(dtype)


def _expert_banks(model: nn.Module) -> Iterator[tuple[str, PackedExperts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts))


class _Filler:
    def __init__(
        self,
        model: nn.Module,
        linears: dict[str, PackedLinear],
        device: torch.device,
        dtype: torch.dtype,
        tied: bool,
        stack_experts: bool,
    ) -> None:
        self.model, self.linears, self.device, self.dtype, self.tied = model, linears, device, dtype, tied
        self.banks = dict(_expert_banks(model)) if stack_experts else {}
        self.parameters = dict(model.named_parameters())
        self.stored: dict[str, torch.dtype] = {}  # plain tensor -> dtype on disk
        self.unexpected: list[str] = []

    def fill(self, source: WeightSource) -> dict[str, torch.dtype]:
        """Returns the dtypes on disk of the plain tensors, by HF name."""
        head = None
        for name, packed in source.load_packed():
            self._packed(name, packed)
        for name, tensor in source.load_plain():
            if self.tied and name == _HEAD:
                head = tensor
            else:
                self._plain(name, tensor)
        self._check_complete()
        if head is not None:
            embedding = self.parameters[_EMBEDDING].to(head.dtype).cpu()
            if not torch.equal(embedding, head.cpu()):
                raise InputError(
                    _HEAD,
                    "equal to the embedding: tie_word_embeddings is true",
                    "another tensor",
                    "set tie_word_embeddings to false in config.json",
                )
            self.stored[_HEAD] = head.dtype
        return self.stored

    def _packed(self, name: str, packed: PackedWeight) -> None:
        if name == _HEAD.removesuffix(".weight") and not self.tied and name not in self.linears:
            self._pack_head()
        module = self.linears.get(name)
        if module is None:
            self.unexpected.append(name)
            return
        if packed.shape != (module.out_features, module.in_features):
            expected = (module.out_features, module.in_features)
            raise InputError(
                f"{name}.weight", f"shape {expected} by config.json", str(packed.shape), "fetch the model again"
            )
        module.packed = self._held(name, packed)

    def _held(self, name: str, packed: PackedWeight) -> PackedWeight:
        """The weight on the device: in its place in a stack, if it is an expert's and those are stacked."""
        expert, _, projection = name.rpartition(".")
        bank, _, index = expert.rpartition(".")
        if bank in self.banks:
            return self.banks[bank].place(int(index), projection, packed, self.device)
        return packed.to(self.device)

    def alone(self) -> list[PackedLinear]:
        """The linears that are computed one at a time."""
        together = {
            id(module)
            for bank in self.banks.values()
            if not bank.apart
            for module in bank.modules()
            if isinstance(module, PackedLinear)
        }
        return [module for module in self.linears.values() if id(module) not in together]

    def _pack_head(self) -> None:
        """The head is an ordinary linear unless the checkpoint quantised it."""
        head: Any = self.model.lm_head
        self.model.lm_head = self.linears["lm_head"] = PackedLinear(head.in_features, head.out_features, bias=False)
        del self.parameters[_HEAD]

    def _plain(self, name: str, tensor: Tensor) -> None:
        owner, _, last = name.rpartition(".")
        module = self.linears.get(owner)
        if module is not None and last == "weight":
            if tensor.dtype != torch.bfloat16:
                raise InputError(
                    name, "bfloat16, or a quantised format", str(tensor.dtype), "run the quantize step on it"
                )
            self._packed(owner, PackedWeight(FormatSpec("bf16"), tuple(tensor.shape), {"weight": tensor}))  # type: ignore[arg-type]
        elif module is not None and last == "bias" and module.has_bias:
            module.bias = self._cast(name, tensor, (module.out_features,))
        elif name in self.parameters:
            parameter = nn.Parameter(self._cast(name, tensor, tuple(self.parameters[name].shape)), requires_grad=False)
            setattr(self.model.get_submodule(owner), last, parameter)
            self.parameters[name] = parameter
        elif not name.endswith("rotary_emb.inv_freq"):
            self.unexpected.append(name)

    def _cast(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise InputError(name, f"shape {shape} by config.json", str(tuple(tensor.shape)), "fetch the model again")
        cast = tensor.to(self.device, self.dtype, copy=True)
        if not torch.equal(cast.to(tensor.device, tensor.dtype), tensor):
            raise InputError(
                name,
                f"values that {self.dtype} holds exactly",
                f"{tensor.dtype} values that would be rounded",
                "set engines.compute_dtype to float32, or store the tensor in bfloat16",
            )
        self.stored[name] = tensor.dtype
        return cast

    def _check_complete(self) -> None:
        missing = [f"{name}.weight" for name, module in self.linears.items() if module.packed is None]
        missing += [f"{name}.bias" for name, module in self.linears.items() if module.has_bias and module.bias is None]
        empty = [name for name, parameter in self.parameters.items() if parameter.is_meta]
        missing += [name for name in empty if not (self.tied and name == _HEAD)]
        if missing or self.unexpected:
            raise InputError(
                "checkpoint tensors",
                "exactly those that config.json implies",
                f"{len(missing)} missing {missing[:5]}, {len(self.unexpected)} unexpected {self.unexpected[:5]}",
                "was the checkpoint written completely, and for this config.json?",
            )
