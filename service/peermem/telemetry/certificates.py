"""The metric of certificates. The rules of `metrics.py` hold here; no label names anybody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily


class Whose(Enum):
    """Whose certificate; values are metric labels."""

    NODE = "node"
    """The one that this node shows."""
    AUTHORITY = "authority"
    """That of the authorities it believes that ends first."""


def certificate_metrics(ends: Mapping[Whose, float]) -> Iterator[Metric]:
    """Yield when certificates end, in seconds since 1970; nothing where there are none."""
    if ends:
        family = GaugeMetricFamily(
            "peermem_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in force ends; of the authorities', the first to end.",
            labels=("certificate",),
        )
        for whose, end in ends.items():
            family.add_metric((whose.value,), end)
        yield family
