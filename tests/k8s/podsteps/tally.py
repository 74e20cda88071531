"""A training step in miniature: `to` ticks of `pause` seconds, each committed to the store by one put-if-absent.

A second try goes on after the last commit. What each commit holds depends on the one before it, so the end shows
whether any was lost, repeated or made from another. `faults` says what happens before a tick, once in all tries:
{"3": "exit 1"} and so on; `refuse` ends it with a wrong input.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

from orbit_core.errors import InputError, Interrupted
from orbit_core.steps.contract import StepContext
from orbit_core.store import open_store
from orbit_core.store.base import Store


def run(context: StepContext) -> dict[str, Any]:
    params, store = context.spec.params, open_store(context.spec.store)
    folder, pod = f"tally/{context.spec.digest[:16]}", os.environ.get("POD_NAME", "local")
    print(f"{pod} begins", file=sys.stderr)
    if params.get("refuse"):
        raise InputError("the tally", "something to count", params["refuse"], "give it something")
    state, first = _resume(store, folder)
    for number in range(first, params["to"]):
        if context.should_stop():
            raise Interrupted(f"counted to {number} of {params['to']}")
        _fault(store, folder, params.get("faults", {}).get(str(number)), number)
        time.sleep(params.get("pause", 0.0))
        state = hashlib.sha256(f"{state} {number}".encode()).hexdigest()
        context.fence()
        store.put_if_absent(f"{folder}/{number:06d}.json", json.dumps({"state": state, "pod": pod}).encode())
        context.progress(number + 1, params["to"], f"counted {number + 1}")
    (context.output / "tally.txt").write_text(state)
    return {"state": state, "resumed_from": first}


def expected(to: int) -> str:
    """The state after `to` ticks that nothing has disturbed."""
    state = ""
    for number in range(to):
        state = hashlib.sha256(f"{state} {number}".encode()).hexdigest()
    return state


def pods_of(store: Store, digest: str) -> list[str]:
    """The pod that committed each tick, in order."""
    return [json.loads(store.read(path))["pod"] for path in _commits(store, f"tally/{digest[:16]}")]


def _commits(store: Store, folder: str) -> list[str]:
    return [path for path in store.list(f"{folder}/") if path.endswith(".json")]


def _resume(store: Store, folder: str) -> tuple[str, int]:
    commits = _commits(store, folder)
    return (json.loads(store.read(commits[-1]))["state"], len(commits)) if commits else ("", 0)


def _fault(store: Store, folder: str, fault: str | None, number: int) -> None:
    if fault and store.put_if_absent(f"{folder}/fault-{number}", b"done"):
        kind, _, value = fault.partition(" ")
        print(f"fault at {number}: {fault}", file=sys.stderr, flush=True)
        if kind == "exit":
            os._exit(int(value))
