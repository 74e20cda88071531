"""The linears and adapters of others beside ours, on one card in one run, as ratios to cuBLAS BF16.

python kernels/bench/peers.py [OUT.json] [--only w4a16,w8a8,adapters] [--without ogs,tinygemm] [--seconds 240]

w4a16     INT4 and MXFP4 weights, M = 1 to 4096: `peers_w4a16.py`
w8a8      FP8 weights and activations, M = 1024 to 16384: `peers_w8a8.py`
adapters  OFT and LoRA in training, PEFT's layers beside ours: `adapters.py`
"""

from __future__ import annotations

from dataclasses import replace

import adapters
from harness import Report, arguments, compile_beforehand
from peers_w4a16 import W4A16
from peers_w8a8 import W8A8
from race import race, show, warm

CONTESTS = {"w4a16": W4A16, "w8a8": W8A8}


def main() -> None:
    parser = arguments(__file__)
    parser.add_argument("--only", default="w4a16,w8a8,adapters")
    parser.add_argument("--without", default="", help="entrants that stay away")
    options = parser.parse_args()
    wanted, away = options.only.split(","), options.without.split(",")
    contests = [
        replace(contest, entrants={who: entrant for who, entrant in contest.entrants.items() if who not in away})
        for name, contest in CONTESTS.items()
        if name in wanted
    ]
    if options.worker:
        return warm(contests, options.worker)
    compile_beforehand()
    failed: dict[str, str] = {}
    report = Report(options, failed=failed)
    for contest in contests:
        race(contest, report, failed)
        show(contest, report.rows)
    if "adapters" in wanted:
        adapters.measure(report, ["training"])


if __name__ == "__main__":
    main()
