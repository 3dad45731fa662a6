"""`make bench`: what this project promises about speed and size, measured beside other engines in one run.

Exit codes: 0 all bars that were measured are met, 1 one is not (0 with --no-fail), 2 something that was asked
for could not be measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bench import fairness, health, lab, report, rounds, scale
from bench.bars import bars
from bench.daemons import daemons
from bench.figures import Series
from bench.machine import machine
from bench.progress import say
from bench.sections import section_of, with_section

PARTS = ("transfers", "health", "scale")
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int
    share: float
    """Of a full run's iterations in one round."""
    health: float
    """Seconds of checks."""
    scale: scale.Plan
    limit: int
    """Seconds after which the run is given up."""


FULL = Effort(5, 1.0, 10.0, scale.Plan(), 900)
QUICK = Effort(1, 0.05, 2.0, scale.Plan(many=1000, concurrent=200, rounds=2, settle=6000, transfers=12_000), 180)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    options = _parser().parse_args(arguments)
    effort = QUICK if options.quick else FULL
    _end_in_order(effort.limit)
    engines = {name: command for name in report.OPTIONS if (command := getattr(options, name))}
    run = _measured(effort, options.only or PARTS, engines)
    if not options.quick and not options.only:
        results = _HERE / "RESULTS.md"
        text, before = report.as_markdown(run), results.read_text()
        for heading in (fairness.HEADING, lab.HEADING):
            text = with_section(text, heading, section_of(before, heading))
        results.write_text(text)
        (_HERE / "results.json").write_text(json.dumps(report.as_json(run), indent=1) + "\n")
    print(json.dumps(report.as_json(run)) if options.json else report.as_text(run))
    return exit_code(run, no_fail=options.no_fail)


def _measured(effort: Effort, parts: Sequence[str], engines: dict[str, str]) -> report.Run:
    series = Series()
    failures: list[str] = []
    checked = grown = None
    with tempfile.TemporaryDirectory(prefix="peermem-bench-") as place:
        folders = {part: Path(place) / part for part in parts}
        for folder in folders.values():
            folder.mkdir()
        if "transfers" in folders:
            series, failures = rounds.measure(folders["transfers"], engines, effort.rounds, effort.share)
        if "health" in folders:
            say(f"health checks under load, {effort.health:g} s of them")
            with daemons(folders["health"], ("a", "b"), _device(health.REGIONS)) as nodes:
                checked = health.measure(nodes, effort.health)
        if "scale" in folders:
            with daemons(folders["scale"], ("a", "b"), _device(effort.scale.room)) as nodes:
                grown = scale.measure(nodes, effort.scale)
    return report.Run(machine(), engines, effort.rounds, series, bars(series, checked, grown), failures)


def exit_code(run: report.Run, *, no_fail: bool) -> int:
    """Return how the run ended, as above."""
    if run.failures:
        return 2
    return int(any(bar.met is False for bar in run.bars) and not no_fail)


def _device(size: int) -> str:
    return f'[[device]]\nname = "bar0"\nsize = "{size >> 20}MiB"'


def _end_in_order(limit: int) -> None:
    """Let a signal, or too much time, end the run like an error, so that everything it started ends too."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        if number == signal.SIGALRM:
            print(f"The run did not end within {limit} s; what it started is stopped.", file=sys.stderr)
        sys.exit(2)

    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    signal.alarm(limit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "make bench", description=__doc__, epilog=report.ENGINES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (option, _) in report.OPTIONS.items():
        parser.add_argument(option, dest=name, metavar="COMMAND", help=name)
    parser.add_argument("--quick", action="store_true", help="less of everything, in a minute; no report")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone (may be repeated); no report")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--no-fail", action="store_true", help="exit with 0 although a bar is not met")
    return parser


if __name__ == "__main__":
    sys.exit(main())
