"""The Gluon kernels have no interpreter; what can be said of them without a GPU is how they compile for one.

Nothing may spill, and the products must stay asynchronous: the assembler makes them wait for each other, silently, when
it finds that registers in use would be overwritten.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILE = """
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from orbit_kernels.fast.int4_pieces import WARPS, layouts
from orbit_kernels.fast.int4_product import Cut, int4_product

for turned, cut in ((False, Cut(128, 256, 128)), (True, Cut(256, 128, 64))):
    tile = [64, cut.outs // 8] if turned else [cut.outs, 8]
    x, words = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(tile[1] * 4, 32, 2)
    constants = {"GROUP": 32, "TURNED": turned, "GROUPED": turned, "SPLIT": False, "BIAS": not turned}
    constants |= {"STAGES": cut.stages(32, turned), **layouts(cut.block, cut.short, cut.outs, 32, turned)}
    signature = {
        "x_tiles": f"tensordesc<bf16[{cut.block}, 64],{x!r}>",
        "x_short_tiles": f"tensordesc<bf16[{cut.short}, 64],{x!r}>",
        "word_tiles": f"tensordesc<i32{tile},{words!r}>",
        **dict.fromkeys(("scales", "bias", "y"), "*bf16"), "partial": "*fp32",
        **dict.fromkeys(("arrivals", "table"), "*i32"),
        **dict.fromkeys(("rows", "items", "tiles", "steps", "parts", "N", "K"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    even = ("scales", "bias", "y", "partial", "arrivals", "table", "N", "K")
    aligned = {(int4_product.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    named = {(int4_product.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(int4_product, signature, named, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    assert compiled.metadata.shared <= 232448, compiled.metadata.shared
    Path(sys.argv[1], f"{turned}.ptx").write_text(compiled.asm["ptx"])
"""


COMPILE_W8A8 = """
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from orbit_kernels.fast.w8a8 import BLOCK, GROUP, HALF, fp8_product, layout, stages

by_step, by_result = gl.NVMMASharedLayout(128, 8, 2), gl.NVMMASharedLayout(128, 16, 2)
for outs in (128, 256):
    constants = {"STAGES": stages(outs), "TOGETHER": 16, "BIAS": True, "product": layout()}
    signature = {
        "code_tiles": f"tensordesc<fp8e4nv[{BLOCK}, {GROUP}],{by_step!r}>",
        "weight_tiles": f"tensordesc<fp8e4nv[{outs}, {GROUP}],{by_step!r}>",
        "x_scales": "*fp32", "w_scales": "*fp32", "bias": "*bf16",
        "y_tiles": f"tensordesc<bf16[{HALF}, 128],{by_result!r}>",
        **dict.fromkeys(("rows", "high", "items", "tiles", "steps"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    even = ("x_scales", "w_scales", "bias")
    aligned = {(fp8_product.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    named = {(fp8_product.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(fp8_product, signature, named, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.metadata.shared <= 232448, compiled.metadata.shared
    Path(sys.argv[1], f"{outs}.ptx").write_text(compiled.asm["ptx"])
"""


COMPILE_NVFP4 = """
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from orbit_kernels.fast.decode_nvfp4 import WARPS, constants, decode_nvfp4_kernel

for kind, tiles in (("nvfp4-divide", 1), ("nvfp4-multiply", 4)):
    constant = {"N": 2560, "K": 9728, "KIND": kind, "BIAS": True, **constants(2560, 9728, tiles)}
    pointers = {
        **dict.fromkeys(("x", "bias", "y"), "*bf16"), "words": "*i32", "scales": "*i16",
        "whole": "*fp32", "partial": "*fp32", "arrivals": "*i32",
    }
    signature = pointers | {"M": "i32"} | dict.fromkeys(constant, "constexpr")
    names = decode_nvfp4_kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    named = {(names.index(name),): value for name, value in constant.items()}
    source = GluonASTSource(decode_nvfp4_kernel, signature, named, aligned)
    options = {"num_warps": WARPS, "maxnreg": 128}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert 2 * compiled.metadata.shared <= 232448, compiled.metadata.shared  # two programs a multiprocessor
    Path(sys.argv[1], f"{tiles}.ptx").write_text(compiled.asm["ptx"])
"""


@pytest.mark.parametrize(
    "code, cuts", [(COMPILE, 2), (COMPILE_W8A8, 2), (COMPILE_NVFP4, 2)], ids=["int4", "w8a8", "nvfp4"]
)
def test_for_hopper_the_products_neither_spill_nor_serialise(tmp_path, code, cuts):
    triton = pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile.py"  # a file, because Triton reads a kernel's source
    script.write_text(code)
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    assembled = list(tmp_path.glob("*.ptx"))
    assert len(assembled) == cuts
    for each in assembled:
        command = [ptxas, "-v", "--gpu-name=sm_90a", each, "-o", tmp_path / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True)
        said = report.stdout + report.stderr
        assert report.returncode == 0 and "serialized" not in said, said[-2000:]
        assert "0 bytes spill stores, 0 bytes spill loads" in said, said[-2000:]
