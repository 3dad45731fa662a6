"""The daemon's own condition on the metrics page."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry

from peermem.core.node import OwnMemory
from peermem.core.quota import Resource
from peermem.core.types import Path
from peermem.telemetry.condition import UNTRIED, Condition, ConditionMetrics, DeviceReach

CONDITION = Condition(
    OwnMemory(private=100, pinned=20, pin_limit=50),
    most_regions=10,
    tenant_use={Resource.BYTES: 0.5},
    reach=(DeviceReach("bar0", "pci_resource", Path.STAGED, Path.P2PDMA, UNTRIED),),
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> ConditionMetrics:
    return ConditionMetrics(registry)


def test_nothing_is_said_before_somebody_can_say(metrics: ConditionMetrics, registry: CollectorRegistry) -> None:
    assert list(registry.collect()) == []


@pytest.mark.parametrize("holds", [False, True])
def test_health_is_asked_for_each_time(metrics: ConditionMetrics, registry: CollectorRegistry, holds: bool) -> None:
    metrics.observe_health(lambda: holds, lambda: not holds)
    assert registry.get_sample_value("peermem_ready") == holds
    assert registry.get_sample_value("peermem_policy_refused") == (not holds)
    assert registry.get_sample_value("peermem_regions_limit") is None


def test_what_is_left_and_how_devices_are_reached(metrics: ConditionMetrics, registry: CollectorRegistry) -> None:
    metrics.observe(lambda: CONDITION)
    read = registry.get_sample_value
    assert (read("peermem_private_memory_bytes"), read("peermem_pinned_memory_bytes")) == (100, 20)
    assert (read("peermem_pinned_memory_limit_bytes"), read("peermem_regions_limit")) == (50, 10)
    assert read("peermem_tenant_highest_use_ratio", {"resource": "bytes"}) == 0.5
    labels = {"device": "bar0", "kind": "pci_resource", "path": "STAGED", "best": "P2PDMA", "why": "untried"}
    assert read("peermem_device_path_info", labels) == 1


def test_memory_that_may_be_pinned_without_a_limit(metrics: ConditionMetrics, registry: CollectorRegistry) -> None:
    metrics.observe(lambda: Condition(OwnMemory(0, 0, None), 1, {}, ()))
    assert registry.get_sample_value("peermem_pinned_memory_limit_bytes") == math.inf
