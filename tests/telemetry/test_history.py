"""The last minutes, by the metrics' own counters."""

from __future__ import annotations

import asyncio
import math

import pytest

from peermem.core.plan import Direction
from peermem.core.transfer import State
from peermem.core.types import FabricKind, Path
from peermem.telemetry.history import KEPT, quantile
from peermem.telemetry.metrics import Metrics

INFINITE = math.inf


def ended(metrics: Metrics, outcome: State, seconds: float) -> None:
    metrics.transfer_ended(outcome, None, Direction.PUSH, FabricKind.TCP, Path.HOST, 1, seconds)


def test_a_point_is_what_was_counted_since_the_one_before() -> None:
    metrics = Metrics("1")
    metrics.transfer_bytes(Direction.PUSH, FabricKind.TCP, Path.HOST, 1 << 30)
    metrics.history.sample(10.0, 1000.0)
    assert not metrics.history.points
    metrics.transfer_bytes(Direction.PUSH, FabricKind.TCP, Path.HOST, 3000)
    metrics.transfer_bytes(Direction.PULL, FabricKind.TCP, Path.HOST, 1000)
    metrics.transfer_bytes(Direction.LOCAL, FabricKind.LOCAL, Path.HOST, 500)
    for _ in range(4):
        ended(metrics, State.SUCCEEDED, 0.002)
    ended(metrics, State.FAILED, 30.0)
    metrics.history.sample(12.0, 1002.0)
    (point,) = metrics.history.points
    assert (point.at, point.bandwidth) == (1002.0, {"tcp": 2000.0, "local": 250.0})
    assert point.ended == {"succeeded": 2.0, "failed": 0.5}
    assert point.p50 is not None
    assert point.p99 is not None
    assert 0.001 < point.p50 < point.p99 <= 0.0025
    metrics.history.sample(13.0, 1003.0)
    assert metrics.history.points[-1].bandwidth == {}
    assert metrics.history.points[-1].p50 is None


def test_no_more_than_so_many_points_are_kept() -> None:
    metrics = Metrics("1")
    for second in range(KEPT + 50):
        metrics.history.sample(float(second), float(second))
    assert len(metrics.history.points) == KEPT
    assert metrics.history.points[-1].at == KEPT + 49


def test_a_clock_that_stands_still_makes_no_point() -> None:
    metrics = Metrics("1")
    metrics.history.sample(1.0, 1.0)
    metrics.history.sample(1.0, 1.0)
    assert metrics.history.points == ()


@pytest.mark.parametrize(
    ("share", "within", "expected"),
    [
        (0.5, {}, None),
        (0.5, {1.0: 0, INFINITE: 0}, None),
        (0.5, {1.0: 10, INFINITE: 10}, 1.0),
        (0.5, {1.0: 0, 4.0: 10, INFINITE: 10}, 2.0),
        (0.99, {1.0: 0, 100.0: 100, INFINITE: 100}, 100**0.99),
        (0.99, {1.0: 0, 4.0: 1, INFINITE: 100}, 4.0),
    ],
)
def test_quantiles(share: float, within: dict[float, float], expected: float | None) -> None:
    assert quantile(share, within) == (None if expected is None else pytest.approx(expected))


async def test_it_is_kept_until_that_is_cancelled() -> None:
    metrics = Metrics("1")
    keeping = asyncio.get_running_loop().create_task(metrics.history.keep())
    await asyncio.sleep(0)
    ended(metrics, State.SUCCEEDED, 1.0)
    metrics.history.sample(1e12, 1e12)
    assert len(metrics.history.points) == 1
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
