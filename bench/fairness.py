"""How much a greedy tenant delays another one's small transfers: `python -m bench.fairness [--rounds N] [--seconds S]`.

Rules of this file:

* One client asks for 4 KiB at a time, one after the other. In each round it does so alone, beside a greedy client of
  another tenant, and beside one of its own tenant, which nothing holds back; all in one run, so that ratios hold.
* The greedy client is a process of its own that keeps 64 MiB transfers in flight between the same two nodes.
* A slice's time is that of its bytes at the greedy one's bandwidth, as measured in the same round.
* The bar: p99 beside another tenant is at most twice the p99 alone, plus one slice's time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import peermem
from bench import processes
from bench.daemons import Daemon, daemons
from bench.figures import percentile, rate
from bench.health import LARGE, SMALL
from bench.machine import machine
from bench.progress import say
from bench.sections import with_section
from peermem.core.units import format_duration

HEADING = "## Between tenants"
_RESULTS = Path(__file__).parent / "RESULTS.md"
_SLICE = 1 << 20
"""Bytes of a slice of the tcp fabric."""
_IN_FLIGHT = 4
_TIMEOUT = 60.0
_DEVICE = f'[[device]]\nname = "bar0"\nsize = "{4 * LARGE >> 20}MiB"'


@dataclass(frozen=True, slots=True)
class Times:
    """Of the small transfers, in seconds."""

    p50: float
    p99: float
    count: int


@dataclass(frozen=True, slots=True)
class Round:
    """What was measured in turn."""

    alone: Times
    beside_another: Times
    beside_itself: Times
    bandwidth: float
    """Of the greedy client beside another tenant, in bytes per second."""

    @property
    def slice_time(self) -> float:
        """Seconds of one slice."""
        return _SLICE / self.bandwidth

    @property
    def share(self) -> float:
        """Of what the bar allows."""
        return self.beside_another.p99 / (2 * self.alone.p99 + self.slice_time)


def measure(rounds: int, seconds: float) -> list[Round]:
    """Measure so many rounds, each state for so many seconds, between two daemons."""
    with tempfile.TemporaryDirectory(prefix="peermem-bench-") as place, ExitStack() as stack:
        nodes = stack.enter_context(daemons(Path(place), ("a", "b"), _DEVICE))
        a, b = (stack.enter_context(peermem.connect(daemon.target)) for daemon in nodes.values())
        regions = [node.create_region(device="bar0", length=LARGE) for node in (a, b, a, b)]
        nobody = stack.enter_context(peermem.connect(nodes["a"].target, attach=False))
        small = [peermem.Slice(region.name, 0, SMALL) for region in regions[:2]]
        measured = []
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            alone = _small(a, small, seconds)
            with _greedy(nodes["a"], regions[2:], seconds) as greedy:
                beside_another = _small(a, small, seconds)
                bandwidth = float(processes.line(greedy)) * LARGE
            with _greedy(nodes["a"], regions[2:], seconds) as greedy:
                beside_itself = _small(nobody, small, seconds)
                processes.line(greedy)
            measured.append(Round(alone, beside_another, beside_itself, bandwidth))
        return measured


@contextmanager
def _greedy(daemon: Daemon, regions: Sequence[peermem.Region], seconds: float) -> Iterator[processes.Process]:
    """Keep large transfers of nobody in particular in flight for somewhat longer."""
    words = [daemon.target, *(region.name for region in regions), str(_IN_FLIGHT), str(LARGE), str(seconds + 1)]
    with processes.module("bench.health", "load", *words) as process:
        processes.line(process)
        yield process


def _small(node: peermem.Node, ends: Sequence[peermem.Slice], seconds: float) -> Times:
    """Move 4 KiB again and again."""
    node.transfer(*ends).wait(_TIMEOUT)
    taken = []
    end = perf_counter() + seconds
    while (began := perf_counter()) < end:
        node.transfer(*ends).wait(_TIMEOUT)
        taken.append(perf_counter() - began)
    return Times(percentile(taken, 0.5), percentile(taken, 0.99), len(taken))


def section(rounds: Sequence[Round], machine: str, note: str) -> str:
    """Return what was measured as a section of RESULTS.md."""
    shares = sorted(each.share for each in rounds)
    verdict = "met" if median(shares) <= 1 else "NOT MET"
    lines = [
        HEADING,
        "",
        f"Made by `python -m bench.fairness` ({len(rounds)} rounds) on {machine}.{note}",
        "",
        "4 KiB from node a to node b over tcp, one transfer after the other, while another client keeps "
        f"{_IN_FLIGHT} transfers of 64 MiB in flight on the same link. The bar is met where p99 beside another tenant "
        "is at most twice the p99 alone plus the time of one slice.",
        "",
        "| round | alone, p50 · p99 | beside another tenant | beside its own tenant | greedy | slice | of the bar |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, each in enumerate(rounds, 1):
        cells = [
            f"{format_duration(times.p50)} · {format_duration(times.p99)}"
            for times in (each.alone, each.beside_another, each.beside_itself)
        ]
        lines.append(
            f"| {number} | {' | '.join(cells)} | {rate(each.bandwidth)} | {format_duration(each.slice_time)} "
            f"| {each.share:.2f} |"
        )
    span = f"{shares[0]:.2f} to {shares[-1]:.2f}"
    lines += ["", f"Of what the bar allows, the median is {median(shares):.2f} ({span}): {verdict}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and put the section into RESULTS.md; return 0 when the bar is met, else 1."""
    parser = argparse.ArgumentParser("python -m bench.fairness", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--note", default="", help="a sentence about the machine, such as that it was busy")
    parser.add_argument("--no-report", action="store_true", help="leave RESULTS.md as it is")
    options = parser.parse_args(arguments)
    rounds = measure(options.rounds, options.seconds)
    text = section(rounds, machine(), f" {options.note}" if options.note else "")
    print(text, end="")
    if not options.no_report:
        _RESULTS.write_text(with_section(_RESULTS.read_text(), HEADING, text))
    return int(median(each.share for each in rounds) > 1)


if __name__ == "__main__":
    sys.exit(main())
