"""`python -m bench.lab [REPORT...]`: what the lab measured, as the section "In the lab" of RESULTS.md.

Rules of this file:

* It reads reports of the lab (`build/lab/report.json` where none is named); of a suite that several have, the last.
* What is not in a report is told as not measured. `make bench` writes the rest of RESULTS.md and keeps this section.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.sections import with_section
from peermem.core.units import format_duration, format_size

HEADING = "## In the lab"
_HERE = Path(__file__).parent
_REPORT = _HERE.parent / "build" / "lab" / "report.json"
_MIB = 1 << 20
_SPEED = ("speed", "storage")
"""Suites that have bars."""
_AWAKE = {
    "bare": "a bare gRPC server, idle",
    "idle": "a daemon, idle",
    "registering": "a daemon that makes a region of 1 GiB",
}

Suites = Mapping[str, Mapping[str, Any]]
"""Figures by suite and name."""

_HOW = """\
The lab (`tests/lab/README.md`) is an emulated machine with software NICs: its absolute speed says nothing about
hardware, ratios of what takes turns in one boot do. perftest runs as it is set, with one queue pair, between the same
two NICs; *bare pyverbs* is a loop with one queue pair, classic work requests made once, 16 outstanding, and a
completion queue that is polled all the time; fio (libaio) has as many blocks of the same size under way, on memory of
the same kind; *copies alone* are the processor's copies of 8 bytes between the BAR and host memory, the slower half of
path STAGED, with nothing else going on. While bandwidth is measured, loops that give way to everything keep the
processors from halting: an emulated one that halts between two packets is woken later than the packet takes. *rounds*
is the lowest and the highest ratio of one round; the median of the rounds decides. A test fails when a bar is missed by
a factor of 2: what is missed by less is told here."""


def main(arguments: Sequence[str]) -> int:
    """Write the section; return the exit code."""
    places = [Path(argument) for argument in arguments] or [_REPORT]
    reports = [json.loads(place.read_text()) for place in places]
    results = _HERE / "RESULTS.md"
    results.write_text(with_section(results.read_text(), HEADING, section(reports)))
    return 0


def section(reports: Iterable[Mapping[str, Any]]) -> str:
    """Return the section."""
    guests = [guest for report in reports for guest in report["guests"].values()]
    suites = {name: suite["figures"] for guest in guests for name, suite in guest["suites"].items()}
    facts = next((guest["facts"] for guest in guests if "speed" in guest["suites"]), guests[-1]["facts"])
    of = {"kernel": "Linux", "python": "Python", "rdma-core": "rdma-core", "perftest": "perftest"}
    versions = ", ".join(f"{name} {facts[key]}" for key, name in of.items() if key in facts)
    bars = [figure for name in _SPEED for figure in suites.get(name, {}).values() if "bound" in figure]
    parts = [
        HEADING,
        f"Made by `make lab` and `python -m bench.lab`, with {versions}.",
        f"{sum(bar['met'] for bar in bars)} of {len(bars)} bars are met.",
        _table(("what", "peermem", "reference", "ratio", "rounds", "bar", ""), map(_bar, bars)),
        _HOW,
        *_awake(suites),
        _soak(suites),
    ]
    return "\n\n".join(parts) + "\n"


def _bar(bar: Mapping[str, Any]) -> Sequence[str]:
    def figure(value: float) -> str:
        return format_duration(value) if bar["unit"] == "s" else _rate(value)

    return (
        bar["name"],
        figure(bar["figure"]),
        f"{figure(bar['reference_figure'])} ({bar['reference']})",
        f"{bar['ratio']:.2f}",
        "{:.2f} to {:.2f}".format(*bar["rounds"]),
        f"{'at least' if bar['at_least'] else 'at most'} {bar['bound']:g}",
        "met" if bar["met"] else "NOT MET",
    )


def _awake(suites: Suites) -> Iterable[str]:
    found = suites.get("speed", {}).get("awake")
    if found:
        yield (
            "Calls one after the other, answered by the control plane. Of the daemon's p99 while it registers, "
            f"{found['p99_ratio']:.1f} is the ratio to the bare server's; the fabric alone registers "
            f"{format_size(found['fabric_alone']['bytes'])} in {format_duration(found['fabric_alone']['seconds'])}, "
            f"and the longest turn of its event loop is then {format_duration(found['fabric_alone']['longest_turn'])}."
        )
        times = ("p50", "p99", "slowest")
        rows = [(what, *(format_duration(found[name][key]) for key in times)) for name, what in _AWAKE.items()]
        yield _table(("answers of", *times), rows)


def _soak(suites: Suites) -> str:
    found = suites.get("soak", {}).get("soak")
    if not found:
        return "The soak was not run."
    before, after = found["before"], found["after"]
    same = all(before[key] == after[key] for key in ("files", "objects", "kernel"))
    return (
        f"Soak: {found['registrations']:,} registrations and {found['operations']:,} operations of one process in "
        f"{format_duration(found['seconds'])}. Its memory grew by {(after['rss'] - before['rss']) >> 10} KiB, what the "
        f"C library has given out by {after['malloc'] - before['malloc']:,} bytes; descriptors, verbs objects and the "
        f"kernel's list of them are {'the same as' if same else 'NOT THE SAME AS'} before."
    )


def _rate(value: float) -> str:
    return f"{value / _MIB:.1f} MiB/s"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
