"""What the C library does with memory that a process frees."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_KEPT_BYTES = 1 << 30


def reuse_freed_memory() -> None:
    """Keep what is freed for what is asked for next, up to a gigabyte; where the C library is not glibc, nothing.

    glibc maps large arrays one by one and hands them back, and the kernel clears every page that it gives out: of a
    step that makes and drops arrays of megabytes all the time, a fourth was spent on that.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
