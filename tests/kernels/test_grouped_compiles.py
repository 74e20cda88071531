"""The Gluon kernels have no interpreter; what can be said of them without a GPU is how they compile for one.

Nothing may spill, and the products must stay asynchronous: the assembler makes them wait for each other, silently, when
it finds that registers in use would be overwritten.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from compiling import run_compiling

COMPILE = """
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from orbit_kernels.fast.packed_pieces import WARPS, layouts
from orbit_kernels.fast.packed_launch import Cut
from orbit_kernels.fast.packed_product import packed_product

kind, group = sys.argv[2], int(sys.argv[3])
per = 4 if kind == "fp8" else 8
cuts = [(False, Cut(128, 256, 128)), (True, Cut(256, 128, 64)), (False, Cut(128, 64, 64, teams=2, tail=3, pieces=7))]
if kind.startswith("nvfp4"):  # the most registers
    cuts.append((False, Cut(256, 128, 64)))
for turned, cut in cuts:
    tile = [64, cut.outs // per] if turned else [cut.outs, 64 // per]
    x, words = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(min(128, tile[1] * 4), 32, 2)
    constants = {"FORMAT": kind, "GROUP": group, "TURNED": turned, "GROUPED": turned, "SPLIT": cut.pieces > 0}
    constants |= {"TOGETHER": cut.pieces > 0, "TEAMS": cut.teams, "EARLY": not turned}
    constants |= {"BIAS": not turned, "STAGES": cut.stages(kind, group, turned), "IN_PLACE": cut.in_place}
    constants |= layouts(cut.block, cut.short, cut.outs, kind, group, turned)
    signature = {
        "x_tiles": f"tensordesc<bf16[{cut.block}, 64],{x!r}>",
        "x_short_tiles": f"tensordesc<bf16[{cut.short}, 64],{x!r}>",
        "word_tiles": f"tensordesc<i32{tile},{words!r}>",
        "y_tiles": f"tensordesc<bf16[{cut.block}, {cut.outs}],{x!r}>",
        "scales": {"int4": "*bf16", "fp8": "*fp32"}.get(kind, "*u8"), "whole": "*fp32",
        "lookup": "*i64",
        **dict.fromkeys(("bias", "y"), "*bf16"), "partial": "*fp32",
        **dict.fromkeys(("arrivals", "table"), "*i32"),
        **dict.fromkeys(("rows", "items", "bands", "tiles", "steps", "uncut", "pieces", "N", "K"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    even = ("scales", "whole", "lookup", "bias", "y", "partial", "arrivals", "table", "N", "K")
    aligned = {(packed_product.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    named = {(packed_product.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(packed_product, signature, named, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    assert compiled.metadata.shared <= 232448, compiled.metadata.shared
    Path(sys.argv[1], f"{turned} {cut.outs} {cut.teams}.ptx").write_text(compiled.asm["ptx"])
"""


COMPILE_W8A8 = """
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from orbit_kernels.fast.w8a8 import BLOCK, GROUP, HALF, TILE, fp8_product, layout, stages

by_step, by_result = gl.NVMMASharedLayout(128, 8, 2), gl.NVMMASharedLayout(128, 16, 2)
for span in (1, 2):
    constants = {"STAGES": stages(span), "SPAN": span, "TOGETHER": 16, "BIAS": True, "product": layout()}
    signature = {
        "code_tiles": f"tensordesc<fp8e4nv[{BLOCK}, {GROUP}],{by_step!r}>",
        "weight_tiles": f"tensordesc<fp8e4nv[{TILE}, {GROUP}],{by_step!r}>",
        "x_scales": "*fp32", "w_scales": "*fp32", "bias": "*bf16",
        "y_tiles": f"tensordesc<bf16[{HALF}, {TILE}],{by_result!r}>",
        **dict.fromkeys(("rows", "high", "tiles", "steps", "pairs", "singles"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    even = ("x_scales", "w_scales", "bias")
    aligned = {(fp8_product.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    named = {(fp8_product.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(fp8_product, signature, named, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.metadata.shared <= 232448, compiled.metadata.shared
    Path(sys.argv[1], f"{span}.ptx").write_text(compiled.asm["ptx"])
"""


COMPILE_WAVE = """
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from orbit_kernels.fast.decode_wave import WARPS, constants, decode_wave_kernel, registers

kind, group = sys.argv[2], int(sys.argv[3])
for tiles, at_rest in ((1, True), (2, False), (8, False)):
    constant = {"N": 2560, "K": 9728, "FORMAT": kind, "GROUP": group, "BIAS": True, "AT_REST": at_rest}
    constant |= constants(2560, 9728, tiles)
    pointers = {
        **dict.fromkeys(("x", "bias", "y"), "*bf16"), "words": "*i32", "scales": "*u8" if kind == "mxfp4" else "*i16",
        "whole": "*fp32", "partial": "*fp32",
    }
    signature = pointers | {"M": "i32"} | dict.fromkeys(constant, "constexpr")
    names = decode_wave_kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    named = {(names.index(name),): value for name, value in constant.items()}
    source = GluonASTSource(decode_wave_kernel, signature, named, aligned)
    options = {"num_warps": WARPS, "maxnreg": registers(tiles)}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    programs = 2 if tiles <= 2 else 1  # on a multiprocessor
    assert programs * compiled.metadata.shared <= 232448, compiled.metadata.shared
    Path(sys.argv[1], f"{tiles}.ptx").write_text(compiled.asm["ptx"])
"""


COMPILE_ROWS = """
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from orbit_kernels.fast.decode_rows import constants, decode_rows_kernel, share
from orbit_kernels.fast.decode_wave import WARPS

kind, group = sys.argv[2], int(sys.argv[3])
for out, width, tokens, at_rest in ((9728, 2560, 1, True), (2560, 9728, 8, True), (7168, 2048, 16, False)):
    chosen, tiles = share(out, tokens, kind), 1 if tokens <= 8 else 2
    constant = {"N": out, "K": width, "FORMAT": kind, "GROUP": group, "BIAS": True, "AT_REST": at_rest}
    constant |= constants(tiles, width, chosen, kind)
    pointers = {
        **dict.fromkeys(("x", "bias", "y"), "*bf16"), "words": "*i32",
        "scales": {"mxfp4": "*u8", "fp8": "*fp32"}.get(kind, "*i16"), "whole": "*fp32",
    }
    signature = pointers | {"M": "i32"} | dict.fromkeys(constant, "constexpr")
    names = decode_rows_kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    named = {(names.index(name),): value for name, value in constant.items()}
    source = GluonASTSource(decode_rows_kernel, signature, named, aligned)
    options = {"num_warps": WARPS, "maxnreg": chosen.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 65536, compiled.metadata.shared  # the rest is for what is on its way
    Path(sys.argv[1], f"{out} {width}.ptx").write_text(compiled.asm["ptx"])
"""


CASES = {
    "int4": (COMPILE, "int4", "32"), "mxfp4": (COMPILE, "mxfp4", "32"), "nvfp4": (COMPILE, "nvfp4-divide", "16"),
    "fp8": (COMPILE, "fp8", "128"), "w8a8": (COMPILE_W8A8,), "wave int4": (COMPILE_WAVE, "int4", "128"),
    "wave mxfp4": (COMPILE_WAVE, "mxfp4", "32"), "wave nvfp4": (COMPILE_WAVE, "nvfp4-divide", "16"),
    "rows int4": (COMPILE_ROWS, "int4", "128"), "rows mxfp4": (COMPILE_ROWS, "mxfp4", "32"),
    "rows nvfp4": (COMPILE_ROWS, "nvfp4-divide", "16"), "rows fp8": (COMPILE_ROWS, "fp8", "128"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_for_hopper_the_products_neither_spill_nor_serialise(tmp_path, case):
    triton = pytest.importorskip("triton")
    code, *arguments = CASES[case]
    run_compiling(code, tmp_path, *arguments)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    assembled = list(tmp_path.glob("*.ptx"))
    assert len(assembled) == (4 if case == "nvfp4" else 2 if case == "w8a8" else 3)
    for each in assembled:
        command = [ptxas, "-v", "--gpu-name=sm_90a", each, "-o", tmp_path / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True)
        said = report.stdout + report.stderr
        assert report.returncode == 0 and "serialized" not in said, said[-2000:]
        assert "0 bytes spill stores, 0 bytes spill loads" in said, said[-2000:]
