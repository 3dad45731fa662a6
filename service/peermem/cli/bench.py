"""The command bench: what transfers cost between two regions, by size and number of segments.

Rules of this file:

* One transfer at a time, timed from the request to the outcome as a job sees them.
* Segments are apart from each other in the source, so that they are not merged into one.
* Beside it the same program times a bare gRPC call to the same daemon: what no transfer can be faster than.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import click
import grpc

import peermem
from peermem.cli import output, parsing
from peermem.cli.options import pass_settings
from peermem.cli.settings import Settings
from peermem.cli.transfers import FABRIC
from peermem.client import targets
from peermem.client.tls import Access
from peermem.core.errors import DeviceNotFound, InvalidField
from peermem.core.units import format_duration, format_size

_HEALTH = "/grpc.health.v1.Health/Check"
_WARM_UP = 3
_FIXED_RUNS = 50
_DISTANCE = 2


@dataclass(frozen=True, slots=True)
class Row:
    """What transfers of one shape cost; times are seconds, bandwidth is bytes per second."""

    size: int
    segments: int
    bytes: int
    iterations: int
    p50: float
    p99: float
    bandwidth: float
    fabric: peermem.FabricKind | None
    limited_by: str


@click.command()
@click.argument("src", default="")
@click.argument("dst", default="")
@click.option("--sizes", type=parsing.SIZES, default="4KiB,64KiB,1MiB,16MiB,64MiB", show_default=True)
@click.option(
    "--segments", type=parsing.SIZES, default="1", show_default=True, help="Numbers of segments of each size."
)
@click.option(
    "--iterations", type=click.IntRange(1), default=200, show_default=True, help="Transfers per row, at most."
)
@click.option("--seconds", type=parsing.DURATION, default="2s", show_default=True, help="Time per row, at most.")
@click.option("--fabric", type=FABRIC, help="Insist on a fabric.")
@pass_settings
def bench(
    settings: Settings,
    src: str,
    dst: str,
    sizes: list[int],
    segments: list[int],
    iterations: int,
    seconds: float,
    fabric: str | None,
) -> None:
    """Measure transfers from SRC to DST.

    Each of them is a device of the asked node, nodes/NODE, nodes/NODE/devices/DEVICE (a region is made
    there and deleted afterwards), or a region (nodes/NODE/regions/REGION; what is in DST is lost).
    Without SRC and DST: the first device of the asked node.
    """
    shapes = [(size, count) for count in segments for size in sizes]
    room = max(map(_room, shapes))
    with ExitStack() as stack:
        source = _place(settings, src, room, stack)
        target = _place(settings, dst or ("" if "/regions/" in src else src), room, stack)
        fitting = [shape for shape in shapes if _room(shape) <= min(source.length, target.length)]
        if not fitting:
            raise InvalidField(f"No shape fits into {source.name} and {target.name}; ask for less.", field="sizes")
        probe = _Probe(settings.node, source, target, fabric)
        echo = _percentiles(list(_times(_echo(settings.node.target, stack), iterations, seconds)))
        rows = [probe.row(shape, iterations, seconds) for shape in fitting]
    _print(settings, (source, target), echo, rows, len(shapes) - len(fitting))


class _Probe:
    """Times transfers of one shape after another between two regions."""

    def __init__(self, node: peermem.Node, source: peermem.Region, target: peermem.Region, fabric: str | None) -> None:
        self._node = node
        self._source = source
        self._target = target
        self._fabric = fabric
        # What a transfer costs however small it is.
        self._fixed, _ = _percentiles(list(_times(lambda: self._once(self._shape(1, 1)), _FIXED_RUNS, 1.0)))

    def row(self, shape: tuple[int, int], iterations: int, seconds: float) -> Row:
        """Measure one shape."""
        size, count = shape
        ranges = self._shape(size, count)
        last = self._once(ranges)
        times = list(_times(lambda: self._once(ranges), iterations, seconds))
        p50, p99 = _percentiles(times)
        return Row(
            size=size,
            segments=count,
            bytes=size * count,
            iterations=len(times),
            p50=p50,
            p99=p99,
            bandwidth=size * count * len(times) / sum(times),
            fabric=last.fabric,
            limited_by="requests" if p50 < 2 * self._fixed else self._bytes_limit(last),
        )

    def _shape(self, size: int, count: int) -> peermem.Strided:
        return peermem.Strided(
            source=self._source,
            destination=self._target,
            length=size,
            count=count,
            source_stride=size * _DISTANCE,
            destination_stride=size,
        )

    def _once(self, ranges: peermem.Strided) -> peermem.TransferInfo:
        return self._node.transfer(segments=[ranges], fabric=self._fabric).wait()

    def _bytes_limit(self, info: peermem.TransferInfo) -> str:
        paths = {region.path.value for region in (self._source, self._target) if region.path}
        return f"{info.fabric.value if info.fabric else 'fabric'} over {' and '.join(sorted(paths))}"


def _room(shape: tuple[int, int]) -> int:
    size, count = shape
    return size * count * (_DISTANCE if count > 1 else 1)


def _place(settings: Settings, place: str, room: int, stack: ExitStack) -> peermem.Region:
    """Return the region that `place` names, or a new one on the node and device that it names."""
    parts = place.split("/") if "/" in place else ["nodes", settings.node.name.removeprefix("nodes/"), "devices", place]
    if len(parts) not in (2, 4) or parts[0] != "nodes" or (len(parts) == 4 and parts[2] not in ("devices", "regions")):
        raise InvalidField(
            f"{place!r} must be DEVICE, nodes/NODE, nodes/NODE/devices/DEVICE or nodes/NODE/regions/REGION.",
            field="place",
        )
    node = settings.node_named("/".join(parts[:2]))
    if len(parts) == 4 and parts[2] == "regions":
        return node.region(place)
    wanted = parts[3] if len(parts) == 4 else ""
    device = next(filter(partial(_serves, wanted), node.devices()), None)
    if device is None:
        raise DeviceNotFound(f"{node.name} has no device {wanted or 'with memory'}.", node=node.name, device=wanted)
    # Half of what is free, at most: the other region may come from the same device.
    return stack.enter_context(
        node.create_region(device=device.name, length=max(1, min(room, device.available // 2)), lease="10min")
    )


def _serves(wanted: str, device: peermem.Device) -> bool:
    """Return whether a region can be made on `device`, and it is the one that is wanted, if any."""
    return device.name == wanted if wanted else device.kind != "adopted"


def _echo(target: str, stack: ExitStack) -> Callable[[], object]:
    """Return a bare unary call to the daemon's health service."""
    access = Access(target, targets.proof(None, target), None)
    shown = access.credentials()
    channel = stack.enter_context(
        grpc.insecure_channel(target) if shown is None else grpc.secure_channel(target, shown, options=access.options)
    )
    check = channel.unary_unary(_HEALTH, request_serializer=bytes, response_deserializer=bytes)
    return lambda: check(b"", timeout=10)


def _times(once: Callable[[], object], iterations: int, seconds: float) -> Iterator[float]:
    """Yield the times of `once`, after some to warm up."""
    for _ in range(_WARM_UP):
        once()
    end = perf_counter() + seconds
    for _ in range(iterations):
        began = perf_counter()
        once()
        now = perf_counter()
        yield now - began
        if now > end:
            return


def _percentiles(times: list[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile."""
    ordered = sorted(times)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


def _print(
    settings: Settings,
    regions: tuple[peermem.Region, peermem.Region],
    echo: tuple[float, float],
    rows: list[Row],
    skipped: int,
) -> None:
    source, target = regions
    if settings.json:
        output.print_json(
            {
                "source": source.name,
                "destination": target.name,
                "round_trip": {"p50": echo[0], "p99": echo[1]},
                "rows": rows,
                "skipped": skipped,
            }
        )
        return
    click.echo(f"{source.name} to {target.name}")
    click.echo(f"bare gRPC round trip: p50 {format_duration(echo[0])}, p99 {format_duration(echo[1])}")
    cells = [
        (
            format_size(row.size),
            row.segments,
            row.iterations,
            output.rate(row.bandwidth),
            format_duration(row.p50),
            format_duration(row.p99),
            f"{row.p50 / echo[0]:.1f}",
            row.limited_by,
        )
        for row in rows
    ]
    output.print_table(("SIZE", "SEGMENTS", "RUNS", "BANDWIDTH", "P50", "P99", "P50/ROUND TRIP", "LIMITED BY"), cells)
    if skipped:
        click.echo(f"{skipped} shapes skipped: they don't fit into {format_size(min(source.length, target.length))}.")
