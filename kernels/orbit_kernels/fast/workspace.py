"""Arrival counters for kernels that split a sum among programs: zero before and after every launch.

Launches on one stream follow each other and may share counters; launches that may overlap must not. So an eager stream
has its own, and each launch captured in a CUDA graph gets its own for good (a graph may replay beside anything else).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

PER_STREAM = 4096  # counters one launch may ask for
POOL = 1 << 22  # int32 counters per device: 16 MiB


class _Pool:
    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(POOL, dtype=torch.int32, device=device)
        self.used = 0
        self.of_stream: dict[int, Tensor] = {}

    def take(self, count: int) -> Tensor:
        if self.used + count > POOL:
            raise RuntimeError(
                f"arrival counters: {POOL} per device are taken by captured graphs; expected room for {count} more. "
                "Capture fewer graphs in one process"
            )
        self.used += count
        return self.counters[self.used - count : self.used]


_POOLS: dict[torch.device, _Pool] = {}


def arrival_counters(count: int, device: torch.device) -> Tensor:
    """int32[>= count] of zeros that no overlapping launch uses.

    Raises RuntimeError when the first call ever is inside a graph capture (run the operation once before), or when
    captured graphs have taken all counters.
    """
    if count > PER_STREAM:
        raise RuntimeError(f"arrival counters: expected at most {PER_STREAM} per launch; found {count}")
    if device.type != "cuda":  # the interpreter
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    pool = _POOLS.get(device)
    if pool is None:
        if capturing:
            raise RuntimeError("arrival counters: expected one call before graph capture; found none. Warm up first")
        pool = _POOLS[device] = _Pool(device)
        torch.cuda.synchronize(device)
    if capturing:
        return pool.take(count)
    stream = torch.cuda.current_stream(device).cuda_stream
    if stream not in pool.of_stream:
        pool.of_stream[stream] = pool.take(PER_STREAM)
    return pool.of_stream[stream]


_HANDED_OVER: dict[tuple[torch.device, int, int], list[Tensor]] = {}


def handed_over(count: int, device: torch.device) -> Tensor:
    """float32[>= count] for sums that one program of a launch hands to another, all ones where none is: whoever takes a
    sum leaves ones. Launches that follow each other share it: those of an eager stream, and on each stream those of one
    capture, whose graph fills it anew before the first of them. It is kept for good, as a graph may be replayed."""
    stream = torch.cuda.current_stream(device).cuda_stream
    capture = _capture(stream)
    kept = _HANDED_OVER.setdefault((device, stream, capture), [])
    if not kept or kept[-1].numel() < count:
        if not capture:
            kept.clear()
        kept.append(torch.full((-(-count // 65536) * 65536,), -1, dtype=torch.int32, device=device).view(torch.float32))
    return kept[-1]


def _capture(stream: int) -> int:
    """The number of the capture that the stream takes part in; 0 if none."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    code = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if code:
        raise RuntimeError(f"cuStreamGetCaptureInfo_v2: expected 0, found error {code}")
    return number.value
