"""Times every way to share out rows in `decode_rows`, beside `decode_wave` where that takes the weight (FP8: not): the
data behind `fast.decode_rows.share`.

    python kernels/bench/tune_rows.py OUT.json [--formats int4-128,mxfp4-32] [--tokens 1,8,16] [--shapes 9728x2560,..]

Every candidate is checked against float64 before it is timed. Kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
from harness import (
    Report,
    Row,
    add_choices,
    arguments,
    compile_beforehand,
    error,
    random_packed,
    reader,
    rotating,
    seconds,
    share,
    stored,
)
from orbit_kernels import dequantize
from orbit_kernels.fast.decode_rows import MOST, Share, decode_rows
from orbit_kernels.fast.decode_wave import WAVE, decode_wave
from orbit_kernels.fast.decode_wave import supports as wave_supports
from orbit_kernels.fast.dispatch import named
from torch.nn import functional as F


def candidates(out: int) -> list[Share]:
    groups, found = out // 16, []
    for each in {-(-groups // WAVE), -(-groups // (2 * WAVE))}:
        for programs in {max(WAVE, -(-groups // each)), -(-groups // each)}:
            for registers, ahead in itertools.product((128, 255), (3, 4, 6, 10)):
                if each <= MOST:
                    found.append(Share(each, programs, registers, ahead))
    return list(dict.fromkeys(found))


def main() -> None:
    parser = arguments(__file__)
    add_choices(parser, "int4-128", (1, 8, 16))
    options = parser.parse_args()
    work = list(itertools.product(options.formats, options.shapes, options.tokens))
    if options.worker:
        each = [(*one, chosen) for one in work for chosen in candidates(one[1][0])]
        for spec, (out, width), m, chosen in share(each, options.worker):
            packed, x = random_packed(spec, out, width), torch.randn(m, width, device="cuda").bfloat16()
            for _ in range(2):  # weights written just before, and at rest
                decode_rows(x, packed, chosen=chosen)
        torch.cuda.synchronize()
        return
    compile_beforehand()
    report = Report(options, ways="microseconds, groups, programs, registers, ahead")
    for spec, (out, width), m in work:
        if report.late:
            break
        some = rotating(spec, out, width)
        x, dense = torch.randn(m, width, device="cuda").bfloat16(), dequantize(some[0])
        exact = x.double() @ dense.double().T
        allowed = 1.02 * error(F.linear(x, dense), exact)
        row: Row = {"format": named(spec), "out": out, "in": width, "M": m}
        row["read_us"] = seconds([reader(stored(packed)) for packed in some]) * 1e6
        if wave_supports(some[0]):
            row["wave_us"] = seconds([partial(decode_wave, x, packed) for packed in some]) * 1e6
        ways: list[tuple[float, ...]] = []
        for chosen in candidates(out):
            found = decode_rows(x, some[0], chosen=chosen)
            assert error(found, exact) <= allowed, (spec, out, width, m, chosen)
            took = seconds([partial(decode_rows, x, packed, chosen=chosen) for packed in some], 9) * 1e6
            ways.append((round(took, 2), *vars(chosen).values()))
        ways.sort()
        row |= {"us": ways[0][0], "over_read": ways[0][0] / row["read_us"], "ways": ways}
        report.add(row)


if __name__ == "__main__":
    main()
