"""The fast paths keep the references' promises: *_suite.py, in Triton's interpreter on a CPU and as it is on a GPU.

A process of its own, because Triton decides at import whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(code: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}  # the suite's GPU half may skip
    return subprocess.run(
        [sys.executable, *code], env=inherited | paths | environment, cwd=ROOT, capture_output=True, text=True
    )


def run_suite(**environment: str) -> str:
    alone = ["-m", "pytest", "-o", "addopts=", "-x", "-q", "-p", "no:cacheprovider"]
    names = ("fast", "few", "wave", "rows", "grouped", "dense", "adapter", "quantize", "w8a8")
    suites = [f"tests/kernels/{name}_suite.py" for name in names]
    done = run([*alone, *suites], **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_in_the_interpreter_the_kernels_compute_what_the_references_do():
    pytest.importorskip("triton")
    assert " passed" in run_suite(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_kernels_keep_every_promise():
    report = run_suite()
    assert " passed" in report and "skipped" not in report


def test_without_a_gpu_the_front_doors_never_load_triton_kernels():
    code = """
import sys, torch
from orbit_kernels import FORMATS, linear, oft, quantize
x = torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True)
linear(x, quantize(torch.randn(64, 256), FORMATS["int4"])).sum().backward()
oft.rotate(x, torch.eye(32, dtype=torch.bfloat16).repeat(8, 1, 1)).sum().backward()
assert not [name for name in sys.modules if name.startswith("orbit_kernels.fast")]
"""
    done = run(["-c", code], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-2000:]
