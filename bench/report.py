"""The report of a run, for people (Markdown) and programs (JSON).

Rules of this file:

* Pure. Nothing in it names the machine, a path, or how the engines' programs are installed.
* The command in it makes the same tables anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.bars import MOONCAKE, NIXL_SHM, NIXL_TCP, STREAM, UNARY, Bar
from bench.echo import ECHO
from bench.figures import Series, Shape, rate
from peermem.core.units import format_duration, format_size

OPTIONS = {
    NIXL_TCP: ("--nixl-tcp", "NIXL_TCP_COMMAND"),
    NIXL_SHM: ("--nixl-shm", "NIXL_SHM_COMMAND"),
    MOONCAKE: ("--mooncake", "MOONCAKE_COMMAND"),
}
"""How each other engine is given, and what stands for its command in the report."""

ENGINES = """\
Each *_COMMAND is a command line that runs another engine between two processes on this host. Arguments
`BYTES:SEGMENTS:ITERATIONS` are appended to it, such as `65536:256:20`; for each it does two transfers to warm up,
then that many one after the other, and prints a line

    nixl[tcp,self] 65536 x256: 1.546 GB/s p50 8477.1 us p99 19362.0 us

(any name without spaces; GB/s is all bytes through the mean time, in units of 10^9 bytes; p50 is of one transfer).
Other lines are passed over. NIXL_TCP_COMMAND runs NIXL over UCX with `UCX_TLS=tcp,self`, NIXL_SHM_COMMAND with
`UCX_TLS=tcp,posix,sysv,cma,self`, MOONCAKE_COMMAND Mooncake's transfer engine over tcp. What is not given is
skipped, and the bars that need it are not measured."""

_COLUMNS = """\
*ratio* is our figure through the reference, and decides; *rounds* is its lowest and highest in one round. *p50* is the
reference's median time through ours: engines that busy-wait on cores which both of their processes share have
transfers that take a multiple of the median, which count in bandwidth and not in p50."""

_HOW = """\
Two daemons on one host, one process each; the client is a third. A transfer is timed from the request to the outcome
in the client's hands: asked for on the daemon's unix socket, planned, carried out and confirmed. The engines'
transfers are prepared once, outside of the time. Ours and theirs take turns, round by round, in the same run; each
figure is the median of its rounds, and bandwidth is all bytes through the mean time, as the engines' programs print
it. *Contiguous* segments lie back to back on both sides, as theirs do, so that neighbours can be merged; *scattered*
ones have gaps, so that nothing can be. Absolute figures drift with the machine; ratios within one run hold.

The gRPC echo is a bare grpc.aio server in a process of its own, on a unix socket, asked by gRPC's synchronous client.
Loopback is one TCP connection between two processes that do nothing else, copy is preadv from one memory file to
another one's mapping. A daemon's memory beyond its regions is RssAnon and RssFile of /proc/PID/status."""

_HEAD = ("what", "peermem", "reference", "ratio", "rounds", "p50", "bar", "", "limit")


@dataclass(frozen=True, slots=True)
class Run:
    """A run and what it found."""

    machine: str
    engines: Collection[str]
    """Other engines that were given."""
    rounds: int
    series: Series
    bars: Sequence[Bar]
    failures: Sequence[str] = ()
    """Sentences about engines that failed."""

    @property
    def command(self) -> str:
        """What makes the same report, with placeholders for the commands of other engines."""
        given = [f'{option} "{command}"' for name, (option, command) in OPTIONS.items() if name in self.engines]
        return f"make bench ARGS='{' '.join(given)}'" if given else "make bench"

    @property
    def remarks(self) -> Sequence[str]:
        """Sentences about what is missing."""
        return [*(f"{name} was not given." for name in OPTIONS if name not in self.engines), *self.failures]


def as_markdown(run: Run) -> str:
    """Return the whole report."""
    measured = [bar for bar in run.bars if bar.met is not None]
    met = sum(bool(bar.met) for bar in measured)
    parts = [
        "# How fast, and how small",
        f"Made by `make bench` ({run.rounds} rounds) on {run.machine}:",
        f"```console\n$ {run.command}\n```",
        " ".join([f"{met} of {len(measured)} measured bars are met.", *run.remarks]),
        "## Bars",
        _table(_HEAD, map(_bar, run.bars)),
        _COLUMNS,
        "## Transfers",
        "GB/s · p50." + _echo(run.series),
        _shapes(run.series),
        "## How it is measured",
        _HOW,
        "## Other engines",
        ENGINES,
    ]
    return "\n\n".join(parts) + "\n"


def as_text(run: Run) -> str:
    """Return the tables for a terminal."""
    rows = [_HEAD, *map(_bar, run.bars)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *run.remarks])


def as_json(run: Run) -> dict[str, Any]:
    """Return the whole report as values of JSON: seconds, bytes, bytes per second."""
    return {
        "command": run.command,
        "machine": run.machine,
        "rounds": run.rounds,
        "remarks": list(run.remarks),
        "bars": [asdict(bar) | {"ratio": bar.ratio, "met": bar.met} for bar in run.bars],
        "transfers": [
            {"source": source, "bytes": shape.size, "segments": shape.segments}
            | {"rounds": [asdict(each) for each in run.series.rounds(source, shape)]}
            for source, shape in run.series
        ],
    }


def _bar(bar: Bar) -> Sequence[str]:
    reference = bar.reference if bar.reference_figure is None else _figure(bar.reference_figure, bar.unit)
    if bar.reference_figure is not None and bar.reference != "the bar":
        reference = f"{reference} ({bar.reference})"
    return (
        bar.name,
        "" if bar.figure is None else _figure(bar.figure, bar.unit),
        reference,
        "" if bar.ratio is None else f"{bar.ratio:.2f}",
        "" if bar.rounds is None else "{:.2f} to {:.2f}".format(*bar.rounds),
        "" if bar.p50_ratio is None else f"{bar.p50_ratio:.2f}",
        f"{'at least' if bar.at_least else 'at most'} {bar.bound:g}",
        {True: "met", False: "NOT MET", None: "not measured"}[bar.met],
        bar.limit,
    )


def _figure(value: float, unit: str) -> str:
    if unit == "GB/s":
        return rate(value)
    return format_duration(value) if unit == "s" else format_size(int(value))


def _echo(series: Series) -> str:
    medians = ((name, series.median(name, ECHO)) for name in (UNARY, STREAM))
    return "".join(f" {name}: {format_duration(median.p50)}." for name, median in medians if median)


def _shapes(series: Series) -> str:
    measured = [(source, shape) for source, shape in series if shape != ECHO]
    shapes = sorted({shape for _, shape in measured}, key=lambda shape: (shape.segments, shape.size))
    sources = dict.fromkeys(source for source, _ in measured)
    rows = ([source, *(_cell(series, source, shape) for shape in shapes)] for source in sources)
    return _table(("", *map(str, shapes)), rows)


def _cell(series: Series, source: str, shape: Shape) -> str:
    median = series.median(source, shape)
    return f"{median.bandwidth / 1e9:.2g} · {format_duration(median.p50)}" if median else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
