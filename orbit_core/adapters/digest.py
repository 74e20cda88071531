"""One digest for one set of tensors: sha256 over the sorted (name, dtype, shape, bytes).

Trainer, engine and file compute it alike, so that equal digests mean equal adapters wherever they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major, as they stand in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_digest(tensor: Tensor) -> str:
    """sha256 hex of (dtype, shape, bytes)."""
    hasher = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    hasher.update(tensor_bytes(tensor))
    return hasher.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 hex of the sorted (name, dtype, shape, bytes)."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(f"{name} {tensor_digest(tensors[name])}\n".encode())
    return hasher.hexdigest()
