"""What holds for all products of this process."""

from __future__ import annotations

_batch_invariant = True


def set_batch_invariant(on: bool) -> None:
    """On (the default): a row decoded has the same bits for every number of rows beside it, from 1 to 64 (weights of
    `fast/dispatch_table.py`: to 32). Off: weights of four bits take other orders of the sum for up to 16 rows, which is
    up to 1.8 times as fast. Results are the same in every run either way. A CUDA graph keeps the mode in which it was
    captured; on a CPU there is one way for all.
    """
    global _batch_invariant
    _batch_invariant = on


def is_batch_invariant() -> bool:
    return _batch_invariant
