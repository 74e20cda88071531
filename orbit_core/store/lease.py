"""A lease in the store: of all processes that want to do one thing, one does it, wherever they run.

Kubernetes may run two pods of one Job (a node that is cut off keeps its pod working while another one starts), and a
file lock frees itself on one machine only. Terms are numbers that only grow:

    leases/<name>/000003.json      the claim of term 3, put only if absent: who, and a number drawn for it
    leases/<name>/000003.beat      rewritten by that holder alone, every seconds/4
    leases/<name>/000003.released  that holder has stopped in good order: the next need not wait

The highest claim holds. Everybody else watches it and claims the next term as soon as it is released, or when its beat
has not changed for `seconds`. A holder whose last beat began more than 3/4 of `seconds` ago has lost for good, even if
its next beat succeeds. Each side measures a duration on its own clock; no two clocks are compared.

Promised, where clocks run at one rate within a quarter and what one process has written another finds under its path
(S3; one filesystem; NFS with lookupcache=none). A listing may be late: claims are numbered without a gap while there is
work, so the highest is found by asking for one after the other.
- When `check()` returns, no later term has begun to work, and none begins before seconds/4 have passed.
- A holder that releases is followed at the next look of a waiter (seconds/8, at most 2 s); one that dies, `seconds`
  later. Who stops for longer than 3/4 of `seconds` (a suspended process, a store out of reach) finds itself out.
- An outage of the store shorter than a third of `seconds` costs nobody the lease.

Not promised: that a write after `check()` lands before the next holder begins. A process can be stopped between the
two, and no store could tell. So whatever is written under a lease must be put if absent, as commits and manifests are:
the lease saves two of everybody's work, the store's one atomic step saves the result. Nor is waiting first come, first
served.

Deletion: a claim is what keeps its number from being claimed twice, so all of them stay until `ready()` says that the
result is there; a holder deletes only the beats of earlier ones. A waiter that slept over the end may still claim an
old number: therefore every claimant looks for a higher claim, then asks `ready()`, before it works.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from orbit_core.errors import InputError, Interrupted, OrbitError
from orbit_core.store.base import Store

MAX_LOOK_SECONDS = 2.0
_log = logging.getLogger(__name__)


class LeaseLost(Interrupted):
    """Another process holds the lease or may take it; what is committed stands, and running again goes on from it."""


class Seen(NamedTuple):
    """What a waiter watches for silence: equal means that the holder has not moved."""

    term: int  # highest claimed; 0: none
    released: bool
    beat: bytes


def boottime() -> float:
    """Seconds that also pass while the machine sleeps, where the system has such a clock: a holder ages asleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class NoLease:
    """In place of a lease where one machine's lock is enough."""

    term, lost = 0, False

    def check(self) -> None:
        """Nobody to be kept apart from."""


class Lease:
    """One process's wish for the lease `name`. `holder` is shown to those who wait; Who waits for a holder of
    other `seconds` waits for the longer of the two.

    `on_lost(reason)` is called in the beating thread when that finds the lease lost before anybody has asked.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        holder: str,
        seconds: float,
        on_lost: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = boottime,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not seconds > 0:
            raise InputError(f"lease {name}", "seconds above 0", f"{seconds}")
        self.store, self.name, self.holder, self.seconds, self.on_lost = store, name, holder, seconds, on_lost
        self.term = 0  # 0: not held
        self._clock, self._sleep = clock, sleep
        self._prefix = f"leases/{name}/"
        self._claim = b""
        self._renewed = 0.0  # when the last successful beat began
        self._reason = ""  # why it is lost

    @contextlib.contextmanager
    def held(
        self, on_wait: Callable[[str], None] = lambda holder: None, ready: Callable[[], bool] = lambda: False
    ) -> Iterator[Lease | None]:
        """Yields self, holding the lease; or None, as soon as `ready()` says that another process has finished.

        `on_wait(holder)` is called once if another process holds it. Raises LeaseLost if we were stopped between our
        claim and the work.
        """
        try:
            mine = self._acquire(on_wait, ready) and not ready()
            if mine:
                self.check()
            with self._beating() if mine else contextlib.nullcontext():
                yield self if mine else None
        finally:
            if self.term:
                self._leave(ready)

    @property
    def lost(self) -> bool:
        """Whether the work should stop, as far as is known without asking the store."""
        if self._clock() - self._renewed > self.seconds * 3 / 4:
            self._lose(f"no beat could be written for {self.seconds * 3 / 4:g} s (store out of reach, or we slept)")
        return bool(self._reason)

    def check(self) -> None:
        """Returns if nobody else has begun to work; raises LeaseLost otherwise. See the module for what that means."""
        if not self.lost:
            try:
                self._compare()
            except (OrbitError, OSError) as error:
                if _is_final(error):
                    raise
                _log.warning("lease %s: the store does not answer, so the clock alone decides: %s", self.name, error)
        if self.lost:  # the answer may have been long in coming
            raise self.loss()

    def loss(self) -> LeaseLost:
        """What to raise once it is lost."""
        return LeaseLost(
            f"lease {self.name}, term {self.term} of {self.holder}\n  expected: held\n  found: {self._reason}\n"
            "  what to do: run again; it waits for the holder and goes on from what is committed"
        )

    def _acquire(self, on_wait: Callable[[str], None], ready: Callable[[], bool]) -> bool:
        """True: held. False: `ready()`. An outage of the store is waited for as long as a silent holder."""
        watched, since, answered, told = Seen(-1, False, b""), 0.0, self._clock(), False
        holder, patience = "", self.seconds
        while True:
            try:
                if ready():
                    return False
                begun = self._clock()
                seen = self._look()
                silent = seen == watched and begun - since >= patience
                if (seen.term == 0 or seen.released or silent) and self._take(seen.term + 1):
                    return True
                answered = self._clock()
                if seen != watched:
                    holder, seconds = self._claimed(seen.term)
                    watched, since, patience = seen, answered, max(seconds, self.seconds)
            except (OrbitError, OSError) as error:
                if _is_final(error) or self._clock() - answered > self.seconds:
                    raise
                _log.warning("waiting for lease %s: %s", self.name, error)
            if holder and not told:
                on_wait(holder)
                told = True
            self._sleep(min(self.seconds / 8, MAX_LOOK_SECONDS))

    def _look(self) -> Seen:
        term = self._highest()
        beat = b""  # none yet, or the term is being swept
        with contextlib.suppress(FileNotFoundError):
            beat = self.store.read(self._path(term, "beat")) if term else b""
        return Seen(term, term > 0 and self.store.exists(self._path(term, "released")), beat)

    def _take(self, term: int) -> bool:
        """Claim `term`; False if another was faster or the number is one of the past."""
        begun = self._clock()
        claim = json.dumps({"holder": self.holder, "seconds": self.seconds, "nonce": uuid.uuid4().hex}).encode()
        won = self.store.put_if_absent(self._path(term, "json"), claim)
        if not won and not self._stands(term, claim):  # S3 may refuse a repeated request because of its own first try
            return False
        if self._highest() > term:
            self.store.delete(self._path(term, "json"))
            return False
        self.term, self._claim, self._renewed, self._reason = term, claim, begun, ""
        return True

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        stop = threading.Event()

        def beat() -> None:
            while (pause := self._beat()) and not stop.wait(pause):
                pass

        thread = threading.Thread(target=beat, name=f"lease {self.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(self.seconds / 4)  # a request that hangs may still land: it is a beat of a term that is over

    def _beat(self) -> float:
        """Renew once; returns the seconds until the next beat, 0 when the lease is lost."""
        knew, pause = bool(self._reason), self.seconds / 4
        try:
            self._renew()
        except (OrbitError, OSError) as error:
            _log.warning("lease %s: a beat failed: %s", self.name, error)
            pause = self.seconds / 16
        if self.lost and not knew:
            self.on_lost(self._reason)
        return 0.0 if self.lost else pause

    def _renew(self) -> None:
        begun = self._clock()
        self.store.put(self._path(self.term, "beat"), uuid.uuid4().bytes)
        if not self.lost:  # else it came too late: a waiter may have made up its mind
            self._renewed = begun
            earlier = (path for path in self._compare() if not path.endswith(".json"))
            self._delete(below=self.term, among=earlier)

    def _compare(self) -> list[str]:
        """Lose the lease if its claim is not the highest; returns what lies under the lease's name."""
        paths = self.store.list(self._prefix)
        if (highest := self._highest(paths, least=self.term)) > self.term:
            self._lose(f"{self._claimed(highest)[0] or 'another process'} holds it, term {highest}")
        elif not self._stands(self.term, self._claim):
            self._lose("the claim is gone: the work was finished by another process, or leases/ was cleaned by hand")
        return paths

    def _lose(self, reason: str) -> None:
        self._reason = self._reason or reason

    def _leave(self, ready: Callable[[], bool]) -> None:
        """Whatever fails here only makes the next one wait: it must not turn finished work into a failure."""
        try:
            if ready():
                ours = (self._path(self.term, kind) for kind in ("beat", "json"))  # a listing may not show them yet
                self._delete(below=self.term + 1, among={*self.store.list(self._prefix), *ours})
            elif self._highest() == self.term:
                self.store.put_if_absent(self._path(self.term, "released"), b"")
        except (OrbitError, OSError) as error:
            if isinstance(error, Interrupted):
                raise
            _log.warning("lease %s: not released: %s", self.name, error)

    def _delete(self, below: int, among: Iterable[str]) -> None:
        for path in among:
            if self._number(path) < below:
                self.store.delete(path)

    def _highest(self, listed: Iterable[str] | None = None, least: int = 0) -> int:
        """The highest term claimed; 0: none. A listing only says where to begin."""
        paths = self.store.list(self._prefix) if listed is None else listed
        term = max(map(self._term_claimed, paths), default=0)
        term = max(term, least)
        while self.store.exists(self._path(term + 1, "json")):
            term += 1
        return term

    def _term_claimed(self, path: str) -> int:
        return self._number(path) if path.endswith(".json") else 0

    def _number(self, path: str) -> int:
        match = re.match(r"\d+", path.removeprefix(self._prefix))
        return int(match[0]) if match else 0

    def _stands(self, term: int, claim: bytes) -> bool:
        try:
            return self.store.read(self._path(term, "json")) == claim
        except FileNotFoundError:
            return False

    def _claimed(self, term: int) -> tuple[str, float]:
        """Holder and seconds of a claim; ("", 0) if there is none, or it has been swept meanwhile."""
        try:
            claim = json.loads(self.store.read(self._path(term, "json")))
        except FileNotFoundError:
            return "", 0.0
        return claim["holder"], claim["seconds"]

    def _path(self, term: int, kind: str) -> str:
        return f"{self._prefix}{term:06d}.{kind}"


def _is_final(error: Exception) -> bool:
    """Whether waiting cannot help: a request to stop, or access refused."""
    return isinstance(error, Interrupted | InputError)
