"""Two 4-bit codes per byte, and what an E2M1 code means.

Byte order: the low nibble is the even column. An int32 word of INT4 is four such bytes, little-endian, so the same
routine serves all three 4-bit formats: nibble i of a word sits at bits 4i.

E2M1 (OCP Microscaling Formats v1.0, section 5.3.3): bit 3 is the sign, bits 2..0 index the magnitudes below.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor

from .base import in_pieces

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0

if sys.byteorder != "little":
    raise ImportError("orbit_kernels reads packed int32 words as bytes and needs a little-endian host")


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Any integer tensor [rows, words] -> uint8 codes 0..15, [rows, 2 * bytes per row]."""
    octets = packed.contiguous().view(torch.uint8)
    return torch.stack((octets & 0xF, octets >> 4), dim=-1).view(packed.shape[0], -1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 [rows, even cols] -> uint8 bytes [rows, cols / 2]."""
    pairs = codes.contiguous().view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def encode_e2m1(values: Tensor) -> Tensor:
    """float values -> uint8 codes 0..15 of the nearest E2M1 number; ties to even, beyond 6 saturates.

    A negative value that rounds to zero keeps its sign (code 8), as it does in compressed-tensors; -0.0 itself is 0.
    """
    magnitude = values.abs()
    # Steps are a half below 2, 1 up to 4, 2 above: the smallest of three straight lines, rounded half to even.
    index = (magnitude * 2).round_()
    index = torch.minimum(index, magnitude.round().add_(2), out=index)
    index = torch.minimum(index, magnitude.mul_(0.5).round_().add_(4), out=index).clamp_(max=7)
    return index.to(torch.uint8) | ((values < 0).view(torch.uint8) << 3)


def encode_groups(groups: Tensor, scale: Tensor) -> Tensor:
    """float32 [rows, n, size], which is overwritten, over scale [rows, n] -> uint8 bytes [rows, n * size / 2] of the
    nearest E2M1 numbers."""
    rows, n, size = groups.shape
    octets = torch.empty(rows, n * size // 2, dtype=torch.uint8, device=groups.device)
    for some in in_pieces(groups.view(rows, -1)):
        quotients = groups[some].div_(scale[some].unsqueeze(2))
        octets[some] = pack_nibbles(encode_e2m1(quotients.flatten(1)))
    return octets


def decode_e2m1(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 bytes [rows, cols / 2] -> the E2M1 numbers [rows, cols], exact in every float dtype."""
    pairs = _e2m1_pairs(dtype, packed.device)
    return pairs[packed.to(torch.int32)].view(packed.shape[0], -1)


@cache
def _e2m1_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 2]: what the low and the high nibble of each byte stand for."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used under autograd later
        values = [*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES)]
        table = [[values[byte & 0xF], values[byte >> 4]] for byte in range(256)]
        return torch.tensor(table, dtype=dtype, device=device)
