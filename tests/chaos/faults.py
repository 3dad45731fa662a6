"""What goes wrong in a run: one fault after the other, as chance has it.

Rules of this file:

* Each fault ends within its time, and `Injector.heal` ends all of them at once.
* A fault counts as injected when it has been done, not when it was planned.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tests.chaos.cluster import Cluster
from tests.chaos.plants import Plant
from tests.chaos.proxy import Mode

FAILPOINTS = (
    "tcp.send=oserror:ECONNRESET*4+150",
    "tcp.receive=oserror:ETIMEDOUT*4+150",
    "tcp.dial=oserror:ECONNREFUSED*3",
    "slice.post=on*20+50",
    "slice.landed=exit+300",
    "slice.landed=stop:700ms*1+100",
    "slice.mend=stop:300ms*5",
    "transfer.prepared=exit+30",
    "transfer.moved=exit+30",
    "transfer.moved=stop:400ms*5",
    "transfer.verify=raise:NODE_UNREACHABLE*3",
    "transfer.begin=raise:LIMIT_REACHED*3",
    "relay.create=raise:NODE_UNREACHABLE*2",
    "relay.follow=stop:500ms*3",
    "link.open=raise:NODE_UNREACHABLE*2",
    "link.accept=raise:LIMIT_REACHED*2",
    "link.fence=raise:NODE_UNREACHABLE*3",
    "link.close=raise:NODE_UNREACHABLE*2",
    "grant.acquire=raise:NODE_UNREACHABLE*3",
    "grant.make=stop:300ms*4",
    "grant.release=stop:300ms*4",
    "region.allocate=raise:DEVICE_FULL*2",
    "region.register=raise:REGISTRATION_REFUSED*2",
    "region.made=exit+6",
    "region.end=stop:200ms*4",
    "region.let_go=exit+5",
    "region.close=stop:300ms*4",
    "device.lost=on*1+3",
)
"""What restarted daemons are told."""
CORRUPT = "tcp.corrupt=on*6+30"
"""Only where every transfer is checked."""
KINDS = (
    ("daemon killed", 20),
    ("daemon stopped", 15),
    ("job killed", 15),
    ("job stopped", 6),
    ("node cut off, silently", 8),
    ("node cut off, with resets", 6),
    ("one direction of gRPC stalled", 6),
    ("links reset", 18),
    ("fabric stalled", 8),
    ("fabric late", 14),
    ("rails late", 8),
    ("node late", 10),
    ("policy changed", 10),
    ("policy broken", 3),
    ("certificate renewed", 3),
)
_PAUSES, _LATE = (0.05, 0.3, 0.8, 1.5, 2.5), (2.0, 3.0)
"""Seconds that a fault lasts. What is late is so for longer than jobs have patience, so that it comes after their
answer: that is when a missing fence shows."""
_AT_ONCE: Mapping[str, Callable[[Cluster, str], None]] = {
    "links reset": lambda cluster, node: cluster.fabric[node].reset(),
    "policy changed": lambda cluster, node: cluster.change_policy(node),
    "policy broken": lambda cluster, node: cluster.break_policy(node),
    "certificate renewed": lambda cluster, node: cluster.certificates.renew(node),
}
_ON_THE_FABRIC = {"fabric stalled": Mode.STALLED, "fabric late": Mode.BULK_LATE, "rails late": Mode.HALF_LATE}
_AROUND_A_NODE = {
    "node cut off, silently": Mode.STALLED,
    "node cut off, with resets": Mode.CUT,
    "node late": Mode.LATE,
}


@dataclass(slots=True)
class Process:
    """A job."""

    number: int
    process: subprocess.Popen[bytes]


@dataclass(slots=True)
class Injected:
    """A fault that was done."""

    kind: str
    node: str
    at: float
    """When it was over: what it hit can recover from here on."""


class Injector:
    """Breaks one thing after the other."""

    def __init__(
        self,
        seed: int,
        cluster: Cluster,
        jobs: Sequence[Process],
        renew: Callable[[int], Process],
        *,
        corrupts: bool,
        spares_daemons: bool,
        plant: Plant | None,
    ) -> None:
        """`renew` starts a job anew in the place of the one with this index. With `corrupts` bytes are changed on the
        way, with `spares_daemons` no daemon is ended, so that their growth can be seen. Daemons that a `plant` is in
        are told nothing else, and keep it."""
        self._kinds = [(kind, weight) for kind, weight in KINDS if kind != "daemon killed" or not spares_daemons]
        if plant is not None and plant.among:
            self._kinds = [(kind, weight) for kind, weight in self._kinds if kind in plant.among]
        self._random = random.Random(seed)
        self._cluster = cluster
        self._jobs = list(jobs)
        self._renew = renew
        self._plant = plant
        self._points = (*FAILPOINTS, CORRUPT) if corrupts else FAILPOINTS
        self.injected: list[Injected] = []

    @property
    def jobs(self) -> Sequence[Process]:
        """Those that run now."""
        return self._jobs

    def run(self, until: float) -> None:
        """Break things until this time of the monotonic clock."""
        names, weights = zip(*self._kinds, strict=True)
        while time.monotonic() < until:
            time.sleep(self._random.uniform(0.1, 0.7))
            (kind,) = self._random.choices(names, weights)
            node = self._random.choice(list(self._cluster.daemons))
            self._break(kind, node)
            self.injected.append(Injected(kind, node, time.monotonic()))
            self._revive()

    def _break(self, kind: str, node: str) -> None:
        cluster, pause = self._cluster, self._random.choice(_LATE if "late" in kind else _PAUSES)
        if kind == "daemon killed":
            self._kill(node, pause)
        elif kind == "daemon stopped":
            self._hold(pause, lambda number: cluster.signal(node, number))
        elif kind == "job killed":
            index = self._random.randrange(len(self._jobs))
            self._jobs[index].process.kill()
            self._jobs[index].process.wait()
            self._jobs[index] = self._renew(index)
        elif kind == "job stopped":
            self._hold(pause, self._random.choice(self._jobs).process.send_signal)
        elif kind in _AT_ONCE:
            _AT_ONCE[kind](cluster, node)
        else:
            self._change_wires(kind, node)
            time.sleep(pause)
        cluster.heal()

    def _change_wires(self, kind: str, node: str) -> None:
        cluster = self._cluster
        if kind in _ON_THE_FABRIC:
            cluster.fabric[node].set(_ON_THE_FABRIC[kind])
        elif kind in _AROUND_A_NODE:
            cluster.isolate(node, _AROUND_A_NODE[kind])
        else:
            pair = self._random.choice(sorted(pair for pair in cluster.control if node in pair))
            cluster.control[pair].set(Mode.STALLED)

    def _hold(self, pause: float, send: Callable[[signal.Signals], None]) -> None:
        send(signal.SIGSTOP)
        time.sleep(pause)
        send(signal.SIGCONT)

    def _kill(self, node: str, pause: float) -> None:
        self._cluster.daemons[node].kill()
        time.sleep(min(pause, 0.8))
        self._start(node)

    def _start(self, node: str) -> None:
        self._cluster.start(node, self._told())
        try:
            self._cluster.daemons[node].ready()
        except AssertionError:
            if not self._cluster.is_dead(node):  # it died at a failpoint: `_revive` is next
                raise

    def _told(self) -> Sequence[str]:
        """Return the failpoints of a daemon that starts."""
        if self._plant is not None:
            return self._plant.failpoints
        points = self._random.sample(self._points, self._random.choice((0, 1, 1, 2)))
        return list({point.partition("=")[0]: point for point in points}.values())

    def _revive(self) -> None:
        """Start daemons that died at a failpoint."""
        for node, daemon in self._cluster.daemons.items():
            if self._cluster.is_dead(node):
                self.injected.append(Injected("daemon died at a failpoint", node, time.monotonic()))
                self._cluster.start(node, self._plant.failpoints if self._plant else ())
                daemon.ready()

    def heal(self) -> None:
        """End all faults; daemons run without failpoints, but for those of a plant."""
        self._cluster.heal()
        for node, daemon in self._cluster.daemons.items():
            self._cluster.signal(node, signal.SIGCONT)
            is_told = self._plant is None and daemon.environ["PEERMEM_FAILPOINTS"] != "[]"
            if is_told or self._cluster.is_dead(node):
                daemon.kill()
                self._cluster.start(node, ())
            daemon.ready()
        for job in self._jobs:
            if job.process.poll() is None:
                job.process.send_signal(signal.SIGCONT)
