"""What is measured, as numbers: shapes of transfers, samples of them, and what an engine's program prints.

Rules of this file:

* Pure. Times are seconds, bandwidth is bytes per second.
* Bandwidth is all bytes through the mean time, p50 is per transfer: as the engines' programs print them.
* A round measures everything once; what is told of a series is the median of its rounds.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from peermem.core.units import format_size

_LINE = re.compile(
    r"^\S+ (?P<size>\d+) x(?P<segments>\d+): (?P<rate>\d+(?:\.\d+)?) GB/s p50 (?P<p50>\d+(?:\.\d+)?) us", re.MULTILINE
)


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """One transfer: so many segments of `size` bytes each."""

    size: int
    segments: int = 1

    @property
    def total(self) -> int:
        """Bytes."""
        return self.size * self.segments

    def __str__(self) -> str:
        return f"{self.segments} x {format_size(self.size)}"


@dataclass(frozen=True, slots=True)
class Sample:
    """What transfers of one shape cost in one round."""

    bandwidth: float
    p50: float


Measured = Mapping[Shape, Sample]
"""One round of one source."""


def sample(total: int, times: Sequence[float]) -> Sample:
    """Return what transfers of `total` bytes that took `times` come to."""
    return Sample(total / mean(times), median(times))


def percentile(times: Iterable[float], share: float) -> float:
    """Return the time that `share` of them don't exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def rate(bandwidth: float) -> str:
    """Return bytes per second in the unit of the engines' programs."""
    return f"{bandwidth / 1e9:.2f} GB/s"


def parse(text: str) -> dict[Shape, Sample]:
    """Return the samples in what an engine's program printed; other lines are passed over."""
    return {
        Shape(int(line["size"]), int(line["segments"])): Sample(float(line["rate"]) * 1e9, float(line["p50"]) * 1e-6)
        for line in _LINE.finditer(text)
    }


class Series:
    """Samples of all rounds, by source and shape."""

    def __init__(self) -> None:
        self._rounds: defaultdict[tuple[str, Shape], list[Sample]] = defaultdict(list)

    def add(self, source: str, measured: Measured) -> None:
        """Take one round of one source."""
        for shape, each in measured.items():
            self._rounds[source, shape].append(each)

    def __iter__(self) -> Iterator[tuple[str, Shape]]:
        return iter(self._rounds)

    def median(self, source: str, shape: Shape) -> Sample | None:
        """Return the median of the rounds, None without any."""
        rounds = self._rounds.get((source, shape))
        if not rounds:
            return None
        return Sample(median(each.bandwidth for each in rounds), median(each.p50 for each in rounds))

    def rounds(self, source: str, shape: Shape) -> Sequence[Sample]:
        """Return the samples of a source and shape, round by round."""
        return self._rounds.get((source, shape), [])
