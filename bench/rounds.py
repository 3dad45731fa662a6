"""The rounds: each measures every source once, ours beside the engine that it is compared with.

Rules of this file:

* Only one source works at a time; the daemons and the echo server are idle meanwhile.
* An engine whose program fails is left out of further rounds, and told of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import bars, echo, limits, processes, transfers
from bench.bars import ours
from bench.daemons import daemons
from bench.figures import Measured, Series, Shape
from bench.progress import say
from bench.transfers import Layout

SHAPES = {
    bars.ONE_4K: 500,
    Shape(64 << 10): 300,
    Shape(1 << 20): 100,
    bars.ONE_64M: 16,
    bars.ONE_256M: 6,
    bars.MANY_4K: 100,
    bars.MANY_64K: 30,
}
"""What is moved, and how many times in one round."""
_ECHOES = 1000
_COPIED = 1 << 20
"""Bytes below which handing a copy to a thread takes longer than the copy."""

Sources = Mapping[str, Callable[[], Measured]]


def measure(
    folder: Path, engines: Mapping[str, str], rounds: int, share: float, shapes: Mapping[Shape, int] = SHAPES
) -> tuple[Series, list[str]]:
    """Return the series of all sources, and a sentence for each engine that failed.

    `engines` are command lines; `share` of the iterations are done.
    """
    series = Series()
    failures: dict[str, str] = {}
    iterations = {shape: max(2, int(count * share)) for shape, count in shapes.items()}
    with ExitStack() as stack:
        sources = _sources(folder, engines, iterations, max(2, int(_ECHOES * share)), stack)
        for number in range(1, rounds + 1):
            for name in [name for name in sources if name not in failures]:
                say(f"round {number} of {rounds}: {name}")
                try:
                    series.add(name, sources[name]())
                except processes.EngineFailed as error:
                    failures[name] = f"{name} failed: {error}."
                    say(failures[name])
    return series, list(failures.values())


def _sources(
    folder: Path, engines: Mapping[str, str], iterations: Mapping[Shape, int], echoes: int, stack: ExitStack
) -> Sources:
    """Start what is to be measured; return how, by name, in the order of a round."""
    many = {shape: count for shape, count in iterations.items() if shape.segments > 1}
    totals = {shape.total: count for shape, count in iterations.items()}
    large = {total: count for total, count in totals.items() if total >= _COPIED} or totals
    device = f'[[device]]\nname = "bar0"\nsize = "{(3 * transfers.room(iterations) >> 20) + 1}MiB"'
    nodes = stack.enter_context(daemons(folder, ("a", "b"), device))
    tcp = stack.enter_context(transfers.pair(nodes["a"], nodes["b"], iterations))
    local = stack.enter_context(transfers.pair(nodes["a"], nodes["a"], iterations))
    bare = stack.enter_context(echo.server(folder))
    run = {name: partial(processes.engine, command, iterations) for name, command in engines.items()}
    return {
        bars.UNARY: partial(echo.unary, bare, echoes),
        ours("tcp", Layout.CONTIGUOUS): partial(tcp.measure, iterations, Layout.CONTIGUOUS),
        **{name: run[name] for name in (bars.NIXL_TCP, bars.MOONCAKE) if name in run},
        ours("tcp", Layout.SCATTERED): partial(tcp.measure, many, Layout.SCATTERED),
        bars.SENDFILE: partial(limits.wire, totals, sendfile=True),
        bars.SENDMSG: partial(limits.wire, totals, sendfile=False),
        ours("local", Layout.CONTIGUOUS): partial(local.measure, iterations, Layout.CONTIGUOUS),
        **{name: run[name] for name in (bars.NIXL_SHM,) if name in run},
        ours("local", Layout.SCATTERED): partial(local.measure, many, Layout.SCATTERED),
        bars.COPY_1: partial(limits.copy, large, 1),
        bars.COPY_2: partial(limits.copy, large, 2),
        bars.STREAM: partial(echo.stream, bare, echoes),
    }
