"""The Gluon kernel has no interpreter; what can be said of it without a GPU is how it compiles for one.

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


def test_for_hopper_the_int4_product_neither_spills_nor_serialises(tmp_path):
    triton = pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile.py"  # a file, because Triton reads a kernel's source
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    for turned in (False, True):
        command = [ptxas, "-v", "--gpu-name=sm_90a", tmp_path / f"{turned}.ptx", "-o", tmp_path / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True)
        said = report.stdout + report.stderr
        assert report.returncode == 0 and "serialized" not in said, said[-2000:]
        assert "0 bytes spill stores, 0 bytes spill loads" in said, said[-2000:]
