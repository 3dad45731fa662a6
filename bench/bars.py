"""The bars of this project: what is demanded, against what was measured.

Rules of this file:

* Pure. Each bar compares our figure with a reference of the same run; it is met by their ratio alone.
* What was not measured is neither met nor missed.
* The limit beside a bar is what the machine or the transport allows at best, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.echo import ECHO
from bench.figures import Sample, Series, Shape, rate
from bench.health import Health
from bench.scale import Plan, Scale
from bench.transfers import Layout
from peermem.core.units import format_duration

KIB, MIB = 1 << 10, 1 << 20
ONE_4K, ONE_64M, ONE_256M = Shape(4 * KIB), Shape(64 * MIB), Shape(256 * MIB)
MANY_4K, MANY_64K = Shape(4 * KIB, 256), Shape(64 * KIB, 256)

NIXL_TCP, NIXL_SHM, MOONCAKE = "NIXL, UCX tcp", "NIXL, shared memory", "Mooncake tcp"
SENDFILE, SENDMSG = "loopback, sendfile", "loopback, sendmsg"
COPY_1, COPY_2 = "copy, 1 thread", "copy, 2 threads"
UNARY, STREAM = "gRPC echo, unary", "gRPC echo, stream"

HEALTH_P99 = 0.050
MEMORY = 150 * MIB
GROWTH = 1.05
"""What an allocator may hold on to without anything growing."""
FLAT = 1.5
LATENCY = 2.5


def ours(fabric: str, layout: Layout) -> str:
    """Return the name of our own source."""
    return f"peermem {fabric}, {layout}"


@dataclass(frozen=True, slots=True)
class Bar:
    """One demand and what became of it."""

    name: str
    unit: str
    """`GB/s`, `s`, `bytes`."""
    bound: float
    """Of the ratio of our figure and the reference."""
    at_least: bool
    """Whether the ratio must be at least the bound; otherwise at most."""
    reference: str
    """What it is compared with."""
    figure: float | None = None
    reference_figure: float | None = None
    p50_ratio: float | None = None
    """Reference p50 through ours, beside a ratio of bandwidths."""
    rounds: tuple[float, float] | None = None
    """Lowest and highest ratio of a single round."""
    limit: str = ""
    """What the machine or the transport allows at best."""

    @property
    def ratio(self) -> float | None:
        """Our figure through the reference."""
        if self.figure is None or not self.reference_figure:
            return None
        return self.figure / self.reference_figure

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None when that was not measured."""
        if self.ratio is None:
            return None
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound


def bars(series: Series, health: Health | None, scale: Scale | None) -> list[Bar]:
    """Return all bars, measured or not."""
    return [*_bandwidth(series), *_latency(series), _health(health), *_scale(scale)]


def _bandwidth(series: Series) -> Iterator[Bar]:
    layouts = (Layout.CONTIGUOUS, Layout.SCATTERED)
    for shape, bound in ((ONE_256M, 1.5), (ONE_64M, 1.5), (MANY_64K, 1.5), (MANY_4K, 1.0)):
        for layout in layouts if shape.segments > 1 else layouts[:1]:
            yield _against(series, "tcp", layout, shape, NIXL_TCP, bound, (SENDFILE, SENDMSG))
    yield _against(series, "local", Layout.CONTIGUOUS, ONE_256M, NIXL_SHM, 1.0, (COPY_1, COPY_2))


def _against(
    series: Series, fabric: str, layout: Layout, shape: Shape, engine: str, bound: float, raw: Sequence[str]
) -> Bar:
    source = ours(fabric, layout)
    mine, other = series.median(source, shape), series.median(engine, shape)
    pairs = zip(series.rounds(source, shape), series.rounds(engine, shape), strict=False)
    return Bar(
        f"{fabric}, {shape}{f', {layout}' if shape.segments > 1 else ''}",
        "GB/s",
        bound,
        True,
        engine,
        mine.bandwidth if mine else None,
        other.bandwidth if other else None,
        p50_ratio=other.p50 / mine.p50 if mine and other else None,
        rounds=_range([a.bandwidth / b.bandwidth for a, b in pairs if b.bandwidth]),
        limit=_limit(mine, series, raw, Shape(shape.total)),
    )


def _limit(mine: Sample | None, series: Series, raw: Sequence[str], shape: Shape) -> str:
    measured = [(each.bandwidth, name) for name in raw if (each := series.median(name, shape))]
    if mine is None or not measured:
        return ""
    best, name = max(measured)
    return f"{name}: {rate(best)}, of which {mine.bandwidth / best:.0%} is reached"


def _range(ratios: Sequence[float]) -> tuple[float, float] | None:
    return (min(ratios), max(ratios)) if ratios else None


def _latency(series: Series) -> Iterator[Bar]:
    echo, stream = series.median(UNARY, ECHO), series.median(STREAM, ECHO)
    limit = "Python, and waking each process on the way"
    if stream:
        limit += f"; {STREAM}, p50: {format_duration(stream.p50)}"
    for fabric in ("tcp", "local"):
        source = ours(fabric, Layout.CONTIGUOUS)
        mine = series.median(source, ONE_4K)
        pairs = zip(series.rounds(source, ONE_4K), series.rounds(UNARY, ECHO), strict=False)
        name = f"{fabric}, {ONE_4K}, p50"
        bar = _most(name, "s", mine.p50 if mine else None, UNARY, echo.p50 if echo else None, LATENCY, limit)
        yield replace(bar, rounds=_range([a.p50 / b.p50 for a, b in pairs]))


def _health(health: Health | None) -> Bar:
    bar = _most("health check while transfers saturate, p99", "s", None, "the bar", HEALTH_P99, 1.0)
    if health is None:
        return bar
    limit = (
        f"an event loop's longest turn, with {rate(health.bandwidth)} and {health.small_rate:.0f} small transfers a "
        f"second going on; p50 {format_duration(health.p50)}, slowest of {health.checks} "
        f"{format_duration(health.slowest)}"
    )
    return replace(bar, figure=health.p99, limit=limit)


def _scale(scale: Scale | None) -> Iterator[Bar]:
    plan = scale.plan if scale else Plan()
    for what, cost, limit in (
        (f"creating a region among {plan.many:,}", "creation", "a unary gRPC call, and the kernel's making of pages"),
        (f"listing {plan.many:,} regions, each", "listing", "making and reading the region's message"),
        (
            f"{plan.concurrent:,} transfers at once among {plan.many:,} regions, each",
            "transfer",
            "Python: two gRPC messages and the planning of one transfer",
        ),
    ):
        many, few = (getattr(scale.many, cost), getattr(scale.few, cost)) if scale else (None, None)
        yield _most(what, "s", many, f"among {plan.few:,}", few, FLAT, limit)
    own = scale.memory if scale else None
    yield _most(
        "a daemon's memory beyond its regions",
        "bytes",
        own,
        "the bar",
        MEMORY,
        1.0,
        "Python and gRPC: 61 MiB at the start",
    )
    settled, after = (scale.settled, scale.after) if scale else (None, None)
    what = f"both daemons' memory after {plan.transfers:,} transfers"
    yield _most(what, "bytes", after, f"after {plan.settle:,}", settled, GROWTH, "what ended transfers are kept for")


def _most(
    name: str, unit: str, figure: float | None, reference: str, other: float | None, bound: float, limit: str = ""
) -> Bar:
    return Bar(name, unit, bound, False, reference, figure, other, limit=limit)
