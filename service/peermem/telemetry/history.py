"""The last minutes of what the metrics count, for the daemon's own page.

Rules of this file:

* It reads the metrics' own counters and keeps nothing else, so that the page and Prometheus never disagree.
* It costs the same however long the daemon runs and however much it does: `KEPT` points, one each `STEP` seconds.
* Of a second in which no transfer ended the times are not looked at: that is most of the cost.
* A quantile is what Prometheus' histogram_quantile would say of that second, but between a bucket's bounds by their
  ratio, because the buckets grow so.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import Counter, Histogram
from prometheus_client.samples import Sample

STEP = 1.0
"""Seconds from one point to the next."""
KEPT = 300
_SUCCEEDED = "succeeded"
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Point:
    """What happened in the seconds before `at`."""

    at: float
    """Unix time."""
    bandwidth: Mapping[str, float]
    """Bytes per second that transfers of this node moved, by fabric; what did not move is left out."""
    ended: Mapping[str, float]
    """Transfers that ended per second, by outcome; an outcome of none is left out."""
    p50: float | None
    """Median time of the transfers that succeeded, in seconds; None where none did."""
    p99: float | None


@dataclass(slots=True)
class _Totals:
    """What was counted up to a moment."""

    moved: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    buckets: dict[float, float] = field(default_factory=dict)
    """Transfers that succeeded within so many seconds, by that bound."""


class History:
    """The last `KEPT` points."""

    def __init__(self, moved: Counter, ended: Counter, durations: Histogram) -> None:
        """`moved` counts bytes, with a label `fabric`; `ended` counts transfers and `durations` has their times, both
        with a label `outcome`."""
        self._moved = moved
        self._ended = ended
        self._durations = durations
        self._points: deque[Point] = deque(maxlen=KEPT)
        self._before = _Totals()
        self._sampled_at: float | None = None

    @property
    def points(self) -> Sequence[Point]:
        """The points that are kept, oldest first."""
        return tuple(self._points)

    async def keep(self) -> None:
        """Add a point each `STEP` seconds, until cancelled."""
        while True:
            self.sample(time.monotonic(), time.time())
            await asyncio.sleep(STEP)

    def sample(self, now: float, at: float) -> None:
        """Add a point for the time since the last call; the first call only begins. `now` is by a clock that never
        jumps, `at` the Unix time."""
        totals, before = self._totals(), self._before
        if self._sampled_at is not None and now > self._sampled_at:
            seconds = now - self._sampled_at
            within = _less(totals.buckets, before.buckets)
            self._points.append(
                Point(
                    at,
                    {name: count / seconds for name, count in _less(totals.moved, before.moved).items() if count},
                    {name: count / seconds for name, count in _less(totals.ended, before.ended).items() if count},
                    quantile(0.5, within),
                    quantile(0.99, within),
                )
            )
        self._before, self._sampled_at = totals, now

    def _totals(self) -> _Totals:
        totals = _Totals()
        for counter, label, into in ((self._moved, "fabric", totals.moved), (self._ended, "outcome", totals.ended)):
            for sample in _samples(counter):
                if sample.name.endswith("_total"):
                    _add(into, sample.labels[label], sample.value)
        if totals.ended == self._before.ended:
            totals.buckets = self._before.buckets
            return totals
        for sample in _samples(self._durations):
            if sample.name.endswith("_bucket") and sample.labels["outcome"] == _SUCCEEDED:
                _add(totals.buckets, float(sample.labels["le"]), sample.value)
        return totals


def quantile(share: float, within: Mapping[float, float]) -> float | None:
    """Return the quantile of a histogram: `within` has, by upper bounds that grow, how many were not above each. None
    where there were none at all."""
    bounds = sorted(within)
    rank = share * within[bounds[-1]] if bounds else 0.0
    if not rank:
        return None
    below, under = 0.0, 0.0
    for bound in bounds:
        if within[bound] >= rank:
            if bound == float("inf") or not below:
                return below or bound
            return float(below * (bound / below) ** ((rank - under) / (within[bound] - under)))
        below, under = bound, within[bound]
    return below


def _samples(metric: Counter | Histogram) -> Sequence[Sample]:
    return [sample for family in metric.collect() for sample in family.samples]


def _add(totals: dict[Key, float], key: Key, value: float) -> None:
    totals[key] = totals.get(key, 0.0) + value


def _less(now: Mapping[Key, float], before: Mapping[Key, float]) -> dict[Key, float]:
    return {key: value - before.get(key, 0.0) for key, value in now.items()}
