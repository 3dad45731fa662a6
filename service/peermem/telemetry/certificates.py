"""The metric of certificates. The rules of `metrics.py` hold here; no label names anybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class Whose(Enum):
    """Whose certificate; values are metric labels."""

    NODE = "node"
    """The one that this node shows."""
    AUTHORITY = "authority"
    """That of the authorities it believes that ends first."""


class CertificateMetrics(Collector):
    """When certificates end."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ends: Callable[[], Mapping[Whose, float]] = dict
        registry.register(self)

    def observe(self, ends: Callable[[], Mapping[Whose, float]]) -> None:
        """Ask `ends` each time the page is made: seconds since 1970."""
        self._ends = ends

    def collect(self) -> Iterator[Metric]:
        """See Collector. Where there are no certificates, there is nothing."""
        ends = self._ends()
        if ends:
            family = GaugeMetricFamily(
                "peermem_tls_certificate_expiry_timestamp_seconds",
                "When the certificate in force ends; of the authorities', the first to end.",
                labels=("certificate",),
            )
            for whose, end in ends.items():
                family.add_metric((whose.value,), end)
            yield family
