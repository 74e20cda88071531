"""An S3 server behind a proxy that does harm, until standard input closes: `bad_server.py SEED OUTAGE`.

Prints {"server": URL without harm, "bucket", "environment": what reaches the bucket through the proxy}.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "faults"), str(TESTS / "k8s"), str(TESTS), str(TESTS.parent), str(TESTS.parent / "kernels")]

from proxy import BAD, Proxy  # noqa: E402
from world import moto_bucket  # noqa: E402

CALM_SECONDS = 10.0  # between two outages


def main(seed: int, outage: float) -> None:
    """`outage`: seconds of each."""
    with moto_bucket() as (url, environment), Proxy(environment["AWS_ENDPOINT_URL"], BAD, seed) as proxy:
        through = {**environment, "AWS_ENDPOINT_URL": proxy.url}
        about = {"server": environment["AWS_ENDPOINT_URL"], "bucket": url.removeprefix("s3://"), "environment": through}
        print(json.dumps(about), flush=True)
        over = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), over.set()), daemon=True).start()
        while not over.wait(CALM_SECONDS):
            proxy.outage(outage)
            over.wait(outage)


if __name__ == "__main__":
    sys.stdout = os.fdopen(os.dup(1), "w")  # the one line is for who started it; servers of the tests are chatty
    os.dup2(2, 1)
    main(int(sys.argv[1]), float(sys.argv[2]))
