"""How things are timed here: one captured CUDA graph per figure, over rotating operands, median of replays.

The operands of one graph add up to several times the L2 cache, so a weight is always read from memory; host overhead
does not count, the gaps between kernels of a graph do. Ceilings are measured in the same process.

Every script is called alike: `python kernels/bench/NAME.py [OUT.json] [--seconds 240]`, without a path it writes
`results/NAME.json`. Where there is much to compile, it first calls itself COMPILERS times with a share of the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what is built on the kernels
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from orbit_kernels import FormatSpec, PackedWeight

SHAPES = [(9728, 2560), (2560, 9728), (4096, 2560), (7168, 2048), (2048, 7168)]  # (out, in)
ROTATE_BYTES = 300e6
LAUNCHES = 24  # in a graph that is timed
LONGEST = 4e-3  # seconds of such a graph, unless its calls take longer
COMPILERS = 14  # processes that compile the kernels beforehand
Thunk = Callable[[], object]
Row = dict[str, Any]
Part = TypeVar("Part")


def arguments(script: str) -> argparse.ArgumentParser:
    """What every script takes; a script adds its own."""
    parser = argparse.ArgumentParser()
    default = Path(script).parent / "results" / f"{Path(script).stem}.json"
    parser.add_argument("path", nargs="?", type=Path, default=default, help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=240.0, help="no further row is begun after these")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser


def add_choices(parser: argparse.ArgumentParser, formats: str, tokens: Iterable[int]) -> None:
    """--formats, --tokens and --shapes, which come as lists."""
    parser.add_argument("--formats", type=lambda names: [spec_of(name) for name in names.split(",")], default=formats)
    numbers = ",".join(map(str, tokens))
    parser.add_argument("--tokens", type=lambda text: [int(m) for m in text.split(",")], default=numbers)
    shapes = ",".join(f"{out}x{width}" for out, width in SHAPES)
    parser.add_argument(
        "--shapes", type=lambda text: [tuple(map(int, shape.split("x"))) for shape in text.split(",")], default=shapes
    )


def compile_beforehand(limit: float = 120.0) -> None:
    """Run this script's workers, which compile what it will time; those still at it after `limit` seconds are ended."""
    begin = time.monotonic()
    argv = [sys.executable, *sys.argv, "--worker"]
    workers = [subprocess.Popen([*argv, f"{index}/{COMPILERS}"]) for index in range(COMPILERS)]
    for worker in workers:
        try:
            worker.wait(max(0.0, begin + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
    codes = [worker.wait() for worker in workers]
    print(f"workers returned {codes} after {time.monotonic() - begin:.0f} s", flush=True)


def share(work: Sequence[Part], worker: str) -> Sequence[Part]:
    """What the worker "3/14" does of it."""
    index, of = map(int, worker.split("/"))
    return work[index::of]


class Report:
    """The JSON of a run: card, command, ceilings and rows, printed and written as they come."""

    def __init__(self, options: argparse.Namespace, **about: Any) -> None:
        self.path: Path = options.path
        self.until = time.monotonic() + options.seconds
        said = ["OUT.json" if word == str(self.path) else word for word in sys.argv[1:]]
        command = " ".join(["python", f"kernels/bench/{Path(sys.argv[0]).name}", *said])
        self.rows: list[Row] = []
        self.result = {**card(), "command": command, **about, "ceilings": ceilings(), "rows": self.rows}
        print(self.result, flush=True)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.until

    @property
    def copy(self) -> float:
        """Bytes a second, read and written."""
        return float(self.result["ceilings"]["copy_GBps"]) * 1e9

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(compact(self.result))


def seconds(calls: Sequence[Thunk], replays: int = 15) -> float:
    """Median seconds per call, all calls captured in one graph, after each has been made once. A graph takes about
    10 us to start: short calls are captured again and again, until LAUNCHES share that."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, rounds = _captured(calls), -(-LAUNCHES // len(calls))
    if rounds > 1:
        rounds = max(1, min(rounds, int(LONGEST / _replayed(graph, 3))))
        graph = _captured(list(calls) * rounds)
    return _replayed(graph, replays) / (rounds * len(calls))


def _captured(calls: Sequence[Thunk]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Median seconds of a replay, after one that is not counted."""
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copies(nbytes: float) -> int:
    """How many sets of operands of `nbytes` keep the L2 cache from helping."""
    return max(2, min(48, int(ROTATE_BYTES / nbytes) + 1))


@triton.jit
def _read(words, out, total, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # pointers
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(words + at, mask=at < total, other=0)))


def reader(words: Tensor) -> Thunk:
    """A kernel that reads int32 words and does nothing else with them: the floor of what must read them."""
    block = 4096
    out = torch.empty(triton.cdiv(words.numel(), block), dtype=torch.int32, device=words.device)
    return lambda: _read[(out.numel(),)](words, out, words.numel(), block, num_warps=8)


def ceilings() -> dict[str, float]:
    """Copy and read bandwidth of kernels (GB/s; copy counts both directions) and cuBLAS BF16 on 8192^3 (TFLOP/s)."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds([partial(torch.mul, source, 1.0, out=target)] * 2)
    read = source.nbytes / seconds([reader(source.view(torch.int32))] * 2)
    del source, target
    torch.cuda.empty_cache()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / seconds([partial(torch.mm, a, b)] * 4)
    return {"copy_GBps": copy / 1e9, "read_GBps": read / 1e9, "bf16_TFLOPs": product / 1e12}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def card() -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def spec_of(name: str) -> FormatSpec:
    """As `dispatch.named` writes it."""
    kind, group = name.split("-")
    return FormatSpec(kind, int(group))


def random_packed(spec: FormatSpec, out: int, width: int) -> PackedWeight:
    """Random codes under random scales of a usual size, as a checkpoint stores them."""

    def random_bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, device="cuda", dtype=torch.uint8)

    if spec.name == "int4":
        words = torch.randint(-(2**31), 2**31 - 1, (out, width // 8), device="cuda", dtype=torch.int32)
        scales = (torch.rand(out, width // spec.group_size, device="cuda") * 0.02 + 0.002).to(torch.bfloat16)
        shape = torch.tensor([out, width], device="cuda")
        tensors = {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}
    elif spec.name == "mxfp4":
        scales = random_bytes(out, width // 32, low=118, high=124)
        tensors = {"weight_packed": random_bytes(out, width // 2), "weight_scale": scales}
    elif spec.name == "nvfp4":
        scales = random_bytes(out, width // 16, low=100, high=127).view(torch.float8_e4m3fn)  # of normal weights
        whole = torch.rand(1, device="cuda") * 1000 + 20000
        tensors = {"weight_packed": random_bytes(out, width // 2), "weight_scale": scales, "weight_global_scale": whole}
    elif spec.name == "bf16":
        tensors = {"weight": torch.randn(out, width, device="cuda").bfloat16()}
    else:
        codes = random_bytes(out, width)
        codes[codes & 0x7F == 0x7F] = 0  # NaN
        scales = torch.rand(-(-out // 128), -(-width // 128), device="cuda") * 1e-3 + 1e-4
        tensors = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scales}
    return PackedWeight(spec, (out, width), tensors)


def rotating(spec: FormatSpec, out: int, width: int) -> list[PackedWeight]:
    """As many random weights as keep the L2 cache from helping."""
    first = random_packed(spec, out, width)
    return [first, *(random_packed(spec, out, width) for _ in range(copies(first.nbytes) - 1))]


def stored(packed: PackedWeight) -> Tensor:
    """Its codes and scales as one int32 tensor, to be read."""
    parts = [t for key, t in packed.tensors.items() if key not in ("weight_shape", "weight_global_scale")]
    return torch.cat([part.flatten().view(torch.uint8) for part in parts]).view(torch.int32)


def compact(result: dict[str, Any]) -> str:
    """JSON with one row a line and four digits a number."""
    rows = [
        {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in result["rows"]
    ]
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in result.items() if key != "rows")
    return "{\n" + head + ' "rows": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]\n}\n"
