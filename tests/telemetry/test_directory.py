"""Metrics of the directory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from tests.telemetry.test_metrics import SNAPSHOT

from peermem.telemetry.directory import DirectoryUse
from peermem.telemetry.metrics import Metrics

USE = DirectoryUse(
    kind="etcd",
    away_for=0.0,
    is_reached=True,
    is_refused=False,
    lease_left=12.5,
    nodes=3,
    published=4,
    unwritten=1,
    renewals=20,
    failed_renewals=2,
    lost_leases=1,
    resumes=5,
    listings=6,
    garbage=7,
)


def page(use: DirectoryUse) -> CollectorRegistry:
    registry = CollectorRegistry()
    Metrics("1", registry).observe(lambda: replace(SNAPSHOT, directory=use))
    return registry


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("away_seconds", 0),
        ("name_taken", 0),
        ("lease_remaining_seconds", 12.5),
        ("nodes", 3),
        ("published_regions", 4),
        ("unwritten_regions", 1),
        ("renewals_total", 20),
        ("failed_renewals_total", 2),
        ("lost_leases_total", 1),
        ("watch_resumes_total", 5),
        ("listings_total", 6),
        ("garbage_entries_total", 7),
    ],
)
def test_each_count_has_its_metric(name: str, value: float) -> None:
    assert page(USE).get_sample_value(f"peermem_directory_{name}") == value


def test_a_directory_that_is_away() -> None:
    registry = page(replace(USE, is_reached=False, away_for=30.0, is_refused=True, lease_left=None))
    assert registry.get_sample_value("peermem_directory_connected", {"kind": "etcd"}) == 0
    assert registry.get_sample_value("peermem_directory_away_seconds") == 30
    assert registry.get_sample_value("peermem_directory_name_taken") == 1
    assert registry.get_sample_value("peermem_directory_lease_remaining_seconds") is None
