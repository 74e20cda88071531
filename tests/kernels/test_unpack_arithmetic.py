"""The arithmetic by which `fast/unpack.py` and `fast/decode_wave.py` make weights, step by step in torch: it has the
bits of the formats' definitions. (That the kernels' instructions do the same is for a GPU to show: fast_suite.py.)"""

from __future__ import annotations

import pytest
import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LIFT = 2.0**32  # weights of four bits come out 2^32 times smaller


def bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).float()


def bfloats(low: int, high: int) -> torch.Tensor:
    """Every bfloat16 number from 2^low up to 2^high."""
    return torch.arange(low + 127 << 7, high + 127 << 7, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def test_an_int4_code_times_its_scale_is_one_fused_operation_on_a_subnormal_number():
    scale, code = bfloats(-90, 25)[:, None], torch.arange(16.0)
    for place in (-133, -129):  # the number that the code's bits are, in units of the code
        lifted = bf16(scale * 2.0 ** (-place - 32))
        fused = bf16((code * 2.0**place).double().mul(lifted).sub(scale.double() * 2.0**-29).float())
        assert torch.equal(fused * LIFT, bf16((code - 8) * scale))


def split(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = bf16(s)
    r = bf16(s * 1.5) - high * 1.5
    last_place = (high.view(torch.int32) & 0x7F800000).view(torch.float32) * 2.0**-7
    low = torch.minimum(torch.maximum(r * 0.6666667, last_place * -0.45), last_place * 0.45)
    return high, (low.view(torch.int32) & -65536).view(torch.float32)


@pytest.mark.parametrize("divided", [True, False])
def test_sixteen_pairs_of_numbers_and_powers_of_two_make_every_nvfp4_weight(divided):
    code = torch.arange(127, dtype=torch.uint8)
    scale = code.view(torch.float8_e4m3fn).float()
    whole = torch.cat([torch.exp2(torch.rand(1000) * 46 - 23), torch.exp2(torch.arange(-23.0, 24.0))])[:, None]
    m, e = torch.minimum(code.int(), code.int() & 7 | 8), torch.maximum(code.int() >> 3, torch.tensor(1)) - 10
    assert torch.equal(m * torch.exp2(e.float()), scale)
    sixteen = torch.arange(16.0) / whole if divided else torch.arange(16.0) * whole
    high, low = (part[:, m] * torch.exp2(e + 94.0) for part in split(sixteen))
    wide = scale / whole if divided else scale * whole
    for number in E2M1:
        code_bits = number * 2.0**-126
        found = bf16((code_bits * high).double().add(bf16(code_bits * low)).float())
        assert torch.equal(found * LIFT, bf16(number * wide))


def test_an_mxfp4_scale_is_moved_up_by_its_exponent_alone():
    stored = torch.arange(30, 161)
    lifted = (stored + 94 << 7).to(torch.int16).view(torch.bfloat16).float()
    weight = E2M1[:, None] * 2.0**-126 * lifted
    assert torch.equal(weight * LIFT, E2M1[:, None] * torch.exp2(stored - 127.0))
