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
from orbit_kernels.fast import grouped_int4 as module

for turned in (False, True):
    tile = [module.STEP, module.ROWS // 8] if turned else [module.ROWS, module.STEP // 8]
    x, words = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(tile[1] * 4, 32, 2)
    constants = {"N": 256, "K": 512, "GROUP": 32, "TURNED": turned, "STAGES": 4, **module.layouts(256, 128, 32, turned)}
    kernel = module._grouped_int4
    signature = {
        "x_tiles": f"tensordesc<bf16[256, 64],{x!r}>", "x_short_tiles": f"tensordesc<bf16[128, 64],{x!r}>",
        "word_tiles": f"tensordesc<i32{tile},{words!r}>", "scales": "*bf16", "y": "*bf16", "table": "*i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i in (3, 4, 5)}
    named = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, named, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
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
