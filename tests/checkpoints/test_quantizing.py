"""The quantiser: exactly the kernels' rounding, in little memory, and it refuses what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from orbit_kernels import FormatSpec, dequantize, quantize
from small_models import MODELS, PRECISIONS, config_of, tensors_of, write_model

from orbit_core.checkpoints import quantizer
from orbit_core.checkpoints.hf import HFCheckpoint
from orbit_core.checkpoints.quantization import declared, precision_of
from orbit_core.checkpoints.quantizer import quantize_checkpoint
from orbit_core.errors import InputError
from orbit_core.recipe import Precision

Base = Callable[[str], Path]


@pytest.mark.parametrize("precision", ["int4-32", "int4-128", "fp8", "mxfp4", "bf16"])
def test_every_linear_is_what_the_kernels_make_of_it(base_model: Base, quantized, precision: str) -> None:  # type: ignore[no-untyped-def]
    base = HFCheckpoint(base_model("moe"))
    for module, packed in HFCheckpoint(quantized("moe", precision)).load_packed():
        expected = quantize(base.tensor(f"{module}.weight"), packed.spec)
        for suffix, tensor in expected.tensors.items():
            assert torch.equal(packed.tensors[suffix].view(torch.uint8), tensor.view(torch.uint8)), (module, suffix)


def test_nvfp4_siblings_share_one_global_scale(base_model: Base, quantized) -> None:  # type: ignore[no-untyped-def]
    base, packed = HFCheckpoint(base_model("moe")), dict(HFCheckpoint(quantized("moe", "nvfp4")).load_packed())
    families = [
        ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"],
        ["model.layers.1.mlp.experts.2.gate_proj", "model.layers.1.mlp.experts.2.up_proj"],
        ["model.layers.1.mlp.experts.2.down_proj"],
    ]
    for family in families:
        whole = torch.cat([base.tensor(f"{module}.weight") for module in family])
        together = quantize(whole, FormatSpec("nvfp4"))
        ours = [packed[module] for module in family]
        assert {float(w.tensors["weight_global_scale"]) for w in ours} == {
            float(together.tensors["weight_global_scale"])
        }
        assert torch.equal(torch.cat([dequantize(w) for w in ours]), dequantize(together))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_size_of_a_slab_changes_no_byte(
    base_model: Base, quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(quantizer, "SLAB_ELEMENTS", 128 * 128)
    quantize_checkpoint(HFCheckpoint(base_model("dense-bias-128")), tmp_path, PRECISIONS[precision])
    assert tensors_of(tmp_path) == tensors_of(quantized("dense-bias-128", precision))


def test_what_is_ignored_stays_bf16_and_is_named_in_the_config(base_model: Base, quantized) -> None:  # type: ignore[no-untyped-def]
    base, checkpoint = HFCheckpoint(base_model("dense-gqa")), HFCheckpoint(quantized("dense-gqa", "int4-32"))
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"):
        assert torch.equal(checkpoint.tensor(name), base.tensor(name))
    assert declared(checkpoint.quantization_config).ignore == ("lm_head",)
    moe = HFCheckpoint(quantized("moe", "fp8"))
    assert declared(moe.quantization_config).ignore == ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head")
    assert all(spec == FormatSpec("fp8") for spec in precision_of(moe)[0].values())


def test_ignore_names_the_last_parts_of_a_module(base_model: Base, tmp_path: Path) -> None:
    precision = Precision(format="mxfp4", ignore=("lm_head", "down_proj", "layers.1.self_attn.o_proj", "ate_proj"))
    quantize_checkpoint(HFCheckpoint(base_model("dense-gqa")), tmp_path, precision)
    formats, ignored = precision_of(HFCheckpoint(tmp_path))
    kept = {module for module, spec in formats.items() if spec.name == "bf16"}
    expected = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"}
    assert kept == expected and set(ignored) == expected | {"lm_head"}


def test_an_untied_lm_head_is_quantised_when_asked_for(base_model: Base, tmp_path: Path) -> None:
    quantize_checkpoint(HFCheckpoint(base_model("dense-gqa")), tmp_path, Precision(format="int4", ignore=()))
    assert HFCheckpoint(tmp_path).packed("lm_head").spec == FormatSpec("int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_float_bases_are_rounded_once_and_the_rest_becomes_bf16(tmp_path: Path, dtype: torch.dtype) -> None:
    base = HFCheckpoint(write_model(tmp_path / "base", config_of(**MODELS["dense-gqa"]), dtype=dtype))
    for form in ("int4", "bf16"):
        quantize_checkpoint(base, tmp_path / form, Precision(format=form))
        checkpoint = HFCheckpoint(tmp_path / form)
        norm, linear = "model.norm.weight", "model.layers.0.mlp.up_proj"
        assert torch.equal(checkpoint.tensor(norm), base.tensor(norm).to(torch.bfloat16))
        expected = dequantize(quantize(base.tensor(f"{linear}.weight"), FormatSpec(form)))
        assert torch.equal(dequantize(checkpoint.packed(linear)), expected)
        assert checkpoint.config["dtype"] == "bfloat16" and "torch_dtype" not in checkpoint.config


def test_fused_experts_are_written_under_their_published_names(base_model: Base, quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """transformers 5 holds experts as two three-dimensional parameters per layer; on disk they are one matrix each."""
    base = HFCheckpoint(base_model("moe"))
    tensors = {name: base.tensor(name) for name in base.metas}
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp.experts"
        parts = [[tensors.pop(f"{mlp}.{e}.{name}_proj.weight") for e in range(3)] for name in ("gate", "up", "down")]
        tensors[f"{mlp}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(*parts[:2], strict=True)])
        tensors[f"{mlp}.down_proj"] = torch.stack(parts[2])
    fused = tmp_path / "fused"
    fused.mkdir()
    from safetensors.torch import save_file

    save_file(tensors, fused / "model.safetensors")
    (fused / "config.json").write_text(json.dumps(base.config))
    for precision in ("nvfp4", "bf16"):
        quantize_checkpoint(HFCheckpoint(fused), tmp_path / precision, PRECISIONS[precision])
        assert tensors_of(tmp_path / precision) == tensors_of(quantized("moe", precision))


@pytest.mark.parametrize(
    ("precision", "hidden"),
    [
        (Precision(format="int4", group_size=128), 64),
        (Precision(format="int4"), 48),
        (Precision(format="nvfp4"), 40),
        (Precision(format="mxfp4"), 48),
    ],
)
def test_a_group_size_that_does_not_divide_names_the_tensor(tmp_path: Path, precision: Precision, hidden: int) -> None:
    base = write_model(tmp_path / "base", config_of("llama", heads=4, groups=2, head_dim=32, hidden=hidden))
    with pytest.raises(InputError) as error:
        quantize_checkpoint(HFCheckpoint(base), tmp_path / "out", precision)
    assert error.value.what.startswith("tensor model.layers.0.") and f"{hidden}" in error.value.found


def test_ragged_fp8_blocks_are_fine(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", config_of("llama", heads=4, groups=2, head_dim=24, hidden=72, inner=200))
    quantize_checkpoint(HFCheckpoint(base), tmp_path / "out", Precision(format="fp8"))
    weight = HFCheckpoint(tmp_path / "out").packed("model.layers.0.mlp.up_proj")
    assert weight.tensors["weight_scale_inv"].shape == (2, 1)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["int4", "nvfp4"])
def test_a_base_that_is_not_finite_is_refused_by_name(tmp_path: Path, name: str, value: float, form: str) -> None:
    config = config_of(**MODELS["dense-gqa"])
    healthy = HFCheckpoint(write_model(tmp_path / "healthy", config))
    bad = healthy.tensor(name)
    bad.view(-1)[5] = value
    base = HFCheckpoint(write_model(tmp_path / "bad", config, replace={name: bad}))
    with pytest.raises(InputError, match=f"tensor {name}"):
        quantize_checkpoint(base, tmp_path / "out", Precision(format=form))


def test_equal_bases_give_equal_files(base_model: Base, quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    quantize_checkpoint(HFCheckpoint(base_model("moe")), tmp_path, PRECISIONS["nvfp4"])
    for path in quantized("moe", "nvfp4").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


MEASURE = """
import sys, torch
from pathlib import Path
from orbit_core.checkpoints.hf import HFCheckpoint
from orbit_core.checkpoints.quantizer import quantize_checkpoint
from orbit_core.checkpoints.megatron import to_megatron
from orbit_core.recipe import Precision
torch.set_num_threads(1)
base, out, form = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
def peak(work):
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM
    before = status("VmRSS")
    work()
    return status("VmHWM") - before
import torch.distributed.checkpoint  # neither imports nor first calls are what is measured
quantize_checkpoint(HFCheckpoint(sys.argv[4]), out / "warm", Precision(format=form))
to_megatron(out / "warm", out / "warm-megatron")
print(peak(lambda: quantize_checkpoint(HFCheckpoint(base), out / form, Precision(format=form))))
print(peak(lambda: to_megatron(out / form, out / "megatron")))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures through Linux's /proc")
def test_memory_is_bounded_by_the_largest_tensor_not_by_the_model(base_model: Base, tmp_path: Path) -> None:
    config = config_of("llama", heads=1, groups=1, head_dim=128, hidden=2048, inner=12288, tied=True)
    config["num_hidden_layers"] = 1
    base = HFCheckpoint(write_model(tmp_path / "base", config))
    largest, whole = max(meta.nbytes for meta in base.metas.values()), sum(meta.nbytes for meta in base.metas.values())
    assert largest == 48 * 2**20 and whole > 144 * 2**20
    arguments = [base.directory, tmp_path, "int4", base_model("dense-gqa")]
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    quantizing, converting = (int(line) for line in done.stdout.split())
    assert quantizing < 1.5 * largest  # rows pass through in slabs: what is held does not grow with the model
    fused = 2 * largest // 4
    assert converting < 2 * fused + 32 * 2**20
