"""Metrics of what fails by itself on the way to other nodes. The rules of `metrics.py` hold here."""

from __future__ import annotations

from enum import Enum
from itertools import product

from prometheus_client import CollectorRegistry, Counter

from peermem.core.types import FabricKind


class Broken(Enum):
    """What failed; values are metric labels."""

    LINK = "link"
    """A link went down."""
    RAIL = "rail"
    """A rail broke, or could not be brought up again; the link goes on with others."""
    SLICE = "slice"
    """A slice came back, because its link or rail broke, and is posted again."""


class FaultMetrics:
    """Counters of what broke."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._failures = Counter(
            "peermem_fabric_failures",
            "Links and rails to other nodes that broke, and slices that came back and were posted again.",
            ("fabric", "what"),
            registry=registry,
        )
        for fabric, what in product(FabricKind, Broken):
            self._failures.labels(fabric.value, what.value)

    def broke(self, fabric: FabricKind, what: Broken) -> None:
        """Something broke by itself."""
        self._failures.labels(fabric.value, what.value).inc()
