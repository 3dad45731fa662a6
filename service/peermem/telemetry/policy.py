"""The metrics of the policy and of tenants' limits. The rules of `metrics.py` hold here; no label names a tenant."""

from __future__ import annotations

import time
from enum import Enum

from prometheus_client import CollectorRegistry, Counter, Gauge

from peermem.core.quota import Resource


class Denial(Enum):
    """Why somebody was denied something; values are metric labels."""

    REGION_HIDDEN = "region_hidden"
    """It may do nothing with the region, and was told that there is none."""
    TRANSFER_HIDDEN = "transfer_hidden"
    """The same of a transfer."""
    RIGHT_MISSING = "right_missing"
    """It sees the region or transfer, and lacks the right."""
    DEVICE = "device"
    """It may make no such region there."""
    FILE = "file"
    """It may not load or store this file."""


class PolicyMetrics:
    """What the policy decided, and whether it is the one in its file."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._denials = Counter(
            "peermem_authorization_denials", "What the policy denied.", ("reason",), registry=registry
        )
        self._rejections = Counter(
            "peermem_quota_rejections", "What a tenant's limit refused.", ("resource",), registry=registry
        )
        self._loaded = Gauge(
            "peermem_policy_loaded_timestamp_seconds", "When the policy in force was loaded.", registry=registry
        )
        self._failures = Counter("peermem_policy_reload_failures", "Policy files that were refused.", registry=registry)
        self._unwritten = Counter(
            "peermem_audit_failures", "Lines that the audit log's file did not take.", registry=registry
        )
        for denial in Denial:
            self._denials.labels(denial.value)
        for resource in Resource:
            self._rejections.labels(resource.value)

    def denied(self, why: Denial) -> None:
        """The policy denied something."""
        self._denials.labels(why.value).inc()

    def not_audited(self) -> None:
        """A line of the audit log could not be written."""
        self._unwritten.inc()

    def rejected(self, resource: Resource) -> None:
        """A tenant's limit refused something."""
        self._rejections.labels(resource.value).inc()

    def loaded(self) -> None:
        """Another policy is in force."""
        self._loaded.set(time.time())

    def reload_failed(self) -> None:
        """A policy file was refused; the policy before it stays in force."""
        self._failures.inc()
