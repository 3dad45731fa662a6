"""How fast two daemons answer health checks while transfers saturate them.

Rules of this file:

* Each client is a process of its own: `python -m bench.health load TARGET SOURCE DESTINATION IN_FLIGHT BYTES SECONDS`
  keeps so many transfers in flight, `python -m bench.health check SECONDS TARGET ...` asks each daemon in turn.
* Checks start when every client has had its first transfer, and end before the first client does.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter

import grpc

import peermem
from bench import processes
from bench.daemons import Daemon
from bench.figures import percentile

LARGE = 64 << 20
SMALL = 4 << 10
REGIONS = 4 * LARGE
"""Bytes that a node's regions need, and more."""
_LARGE_CLIENTS = 2
"""Each way."""
_SMALL_IN_FLIGHT = 32
_PAUSE = 0.001
_TIMEOUT = 60.0
_METHOD = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True, slots=True)
class Health:
    """What was seen in the same time."""

    p99: float
    """Seconds, of the slower daemon."""
    p50: float
    slowest: float
    checks: int
    bandwidth: float
    """Bytes per second of all large transfers."""
    small_rate: float
    """Small transfers per second."""


def measure(nodes: Mapping[str, Daemon], seconds: float) -> Health:
    """Ask for health for so long, while transfers of two sizes go both ways between both daemons."""
    with ExitStack() as stack:
        loads = list(_loads(nodes, stack))
        clients = [
            stack.enter_context(processes.module("bench.health", "load", *load, str(size), str(seconds + 1)))
            for size, load in loads
        ]
        for client in clients:
            processes.line(client)
        targets = [daemon.target for daemon in nodes.values()]
        probe = stack.enter_context(processes.module("bench.health", "check", str(seconds), *targets))
        answers = json.loads(processes.line(probe))
        rates = [float(processes.line(client)) for client in clients]
    large = sum(rate for rate, (size, _) in zip(rates, loads, strict=True) if size == LARGE)
    worst = max(answers, key=lambda answer: float(answer["p99"]))
    return Health(**worst, bandwidth=large * LARGE, small_rate=sum(rates) - large)


def _loads(nodes: Mapping[str, Daemon], stack: ExitStack) -> Iterator[tuple[int, list[str]]]:
    """Make the regions; yield the bytes of each client's transfers, and what else it is told."""
    a, b = (stack.enter_context(peermem.connect(daemon.target)) for daemon in nodes.values())
    for here, there in ((a, b), (b, a)):
        source, target = (node.create_region(device="bar0", length=LARGE).name for node in (here, there))
        for size, in_flight in [(LARGE, 1)] * _LARGE_CLIENTS + [(SMALL, _SMALL_IN_FLIGHT)]:
            yield size, [here.target, source, target, str(in_flight)]


def _load(target: str, source: str, destination: str, size: int, in_flight: int, seconds: float) -> None:
    """Keep transfers in flight; print a line after the first, and their rate at the end."""
    read, written = peermem.Slice(source, 0, size), peermem.Slice(destination, 0, size)
    with peermem.connect(target, attach=False) as node:
        node.transfer(read, written).wait(_TIMEOUT)
        print("moving", flush=True)
        began = now = perf_counter()
        flights = deque(node.transfer(read, written) for _ in range(in_flight))
        count = 0
        while now < began + seconds:
            flights.popleft().wait(_TIMEOUT)
            flights.append(node.transfer(read, written))
            count, now = count + 1, perf_counter()
        print(count / (now - began), flush=True)
        for flight in flights:
            flight.wait(_TIMEOUT)


def _check(seconds: float, targets: Sequence[str]) -> None:
    """Print what the checks of each daemon took."""
    with ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(target)) for target in targets]
        checks: list[Callable[..., bytes]] = [channel.unary_unary(_METHOD) for channel in channels]
        times: list[list[float]] = [[] for _ in checks]
        for check in checks:
            check(b"", timeout=_TIMEOUT)
        end = perf_counter() + seconds
        while perf_counter() < end:
            for check, taken in zip(checks, times, strict=True):
                began = perf_counter()
                check(b"", timeout=_TIMEOUT)
                taken.append(perf_counter() - began)
                time.sleep(_PAUSE)
    answers = [
        {
            "p99": percentile(taken, 0.99),
            "p50": percentile(taken, 0.5),
            "slowest": max(taken),
            "checks": len(taken),
        }
        for taken in times
    ]
    print(json.dumps(answers), flush=True)


def _main(mode: str, *arguments: str) -> None:
    if mode == "load":
        target, source, destination, in_flight, size, seconds = arguments
        _load(target, source, destination, int(size), int(in_flight), float(seconds))
    else:
        _check(float(arguments[0]), arguments[1:])


if __name__ == "__main__":
    _main(*sys.argv[1:])
