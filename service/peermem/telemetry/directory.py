"""Metrics of the directory.

Rules of this file:

* The directory counts; this reads its counts when the page is made, so that the two can't differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


@dataclass(frozen=True, slots=True)
class DirectoryUse:
    """The directory, now; times in seconds, counts since the start."""

    kind: str
    away_for: float
    """0 while it can be reached."""
    is_reached: bool
    is_refused: bool
    """Whether it has another node of this one's name."""
    lease_left: float | None
    """None without a lease."""
    nodes: int
    published: int
    unwritten: int
    renewals: int
    failed_renewals: int
    lost_leases: int
    resumes: int
    listings: int
    garbage: int


def directory_metrics(use: DirectoryUse) -> Iterator[Metric]:
    """Yield the metrics of the directory."""
    reached = GaugeMetricFamily(
        "peermem_directory_connected", "Whether the directory can be reached.", labels=("kind",)
    )
    reached.add_metric((use.kind,), int(use.is_reached))
    yield reached
    gauges = {
        "away_seconds": ("Time for which the directory could not be reached; 0 while it can.", use.away_for),
        "name_taken": ("Whether another daemon is in the directory under this node's name.", int(use.is_refused)),
        "nodes": ("Nodes that the directory knows, this one among them.", use.nodes),
        "published_regions": ("Regions of this node that the directory is to tell of.", use.published),
        "unwritten_regions": ("Changes of published regions that the directory was not told yet.", use.unwritten),
    }
    if use.lease_left is not None:
        text = "Time until the others take this node for gone, unless the lease is renewed."
        gauges["lease_remaining_seconds"] = (text, use.lease_left)
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"peermem_directory_{name}", text, value=value)
    for name, text, count in (
        ("renewals", "Renewals of this node's lease.", use.renewals),
        ("failed_renewals", "Renewals of the lease that failed.", use.failed_renewals),
        ("lost_leases", "Times that the lease had ended, so that others took this node for gone.", use.lost_leases),
        ("watch_resumes", "Times that the watch of the nodes went on where it was broken off.", use.resumes),
        ("listings", "Times that all nodes were read, at the start or as a watch could not go on.", use.listings),
        ("garbage_entries", "Entries of the directory that made no sense, and were left out.", use.garbage),
    ):
        yield CounterMetricFamily(f"peermem_directory_{name}", text, value=count)
