"""Metrics of loads and stores. The rules of `metrics.py` hold here."""

from __future__ import annotations

from itertools import product

from prometheus_client import CollectorRegistry, Counter, Histogram

from peermem.core.errors import PeermemError, TransferCancelled
from peermem.core.storage import Order, StorageFacts, Way
from peermem.core.transfer import State


class StorageMetrics:
    """Counters and durations of loads and stores."""

    def __init__(self, registry: CollectorRegistry, buckets: tuple[float, ...]) -> None:
        """`buckets` are those of durations, in seconds."""
        self._runs = Counter(
            "peermem_storage_operations",
            "Loads and stores that ended.",
            ("operation", "outcome", "way"),
            registry=registry,
        )
        self._failures = Counter(
            "peermem_storage_failures",
            "Loads and stores that failed, by reason.",
            ("operation", "reason", "code"),
            registry=registry,
        )
        self._bytes = Counter(
            "peermem_storage_bytes", "Bytes that loads and stores moved.", ("operation", "way"), registry=registry
        )
        self._duration = Histogram(
            "peermem_storage_duration_seconds",
            "Time from a load's or store's beginning to its end.",
            ("operation", "outcome"),
            buckets=buckets,
            registry=registry,
        )
        for order, way in product(Order, Way):
            self._runs.labels(order.value, _word(State.SUCCEEDED), way.value)
            self._bytes.labels(order.value, way.value)
        for order, word in product(Order, (*(way.value for way in Way), "none")):
            self._runs.labels(order.value, _word(State.FAILED), word)

    def moved(self, order: Order, way: Way, count: int) -> None:
        """Some bytes of a running load or store are in place. May be called in any thread."""
        self._bytes.labels(order.value, way.value).inc(count)

    def ended(self, order: Order, facts: StorageFacts, error: PeermemError | None) -> None:
        """A load or store ended, for this reason where it did not succeed."""
        state = State.CANCELLED if isinstance(error, TransferCancelled) else State.FAILED if error else State.SUCCEEDED
        self._runs.labels(order.value, _word(state), facts.way.value if facts.way else "none").inc()
        self._duration.labels(order.value, _word(state)).observe(facts.duration or 0.0)
        if error is not None and state is State.FAILED:
            self._failures.labels(order.value, error.reason, error.code.name).inc()


def _word(outcome: State) -> str:
    return outcome.value.lower()
