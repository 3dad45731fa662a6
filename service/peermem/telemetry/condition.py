"""Metrics of the daemon's own condition: whether it takes work, what it has left, and how it reaches its devices.

The rules of `metrics.py` hold here. All of it is asked for when the page is made; whether the daemon is ready can be
asked from the start on, so that a daemon that can't start says so here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from peermem.core.node import OwnMemory
from peermem.core.quota import Resource
from peermem.core.types import Path
from peermem.telemetry.gauges import gauge

WORKS, UNTRIED, NO_VERBS = "none", "untried", "verbs_off"
"""Why a device is not reached by its best path, where no error says it: it is; not tried yet; not configured."""


@dataclass(frozen=True, slots=True)
class DeviceReach:
    """How regions of a device are reached, as far as that is known without a trial."""

    device: str
    kind: str
    path: Path
    best: Path
    """The best path that a device of this kind may have."""
    why: str
    """What keeps it from the best path: WORKS, UNTRIED, NO_VERBS, or the reason of an error."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What a daemon has left, and how it reaches its devices, now."""

    memory: OwnMemory
    most_regions: int
    """Regions that it may have at the same time."""
    tenant_use: Mapping[Resource, float]
    """For each limit on what is held: the highest use by any one tenant, as a share of its limit."""
    reach: tuple[DeviceReach, ...]


class ConditionMetrics(Collector):
    """Gauges of a daemon's condition."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ready: Callable[[], bool] | None = None
        self._refused: Callable[[], bool] | None = None
        self._condition: Callable[[], Condition] | None = None
        registry.register(self)

    def observe_health(self, ready: Callable[[], bool], policy_refused: Callable[[], bool]) -> None:
        """Ask these from now on: whether the daemon takes work, and whether its policy file is refused."""
        self._ready, self._refused = ready, policy_refused

    def observe(self, condition: Callable[[], Condition]) -> None:
        """Ask for the rest of its condition from now on."""
        self._condition = condition

    def collect(self) -> Iterator[Metric]:
        """Yield what can be said by now."""
        if self._ready is not None and self._refused is not None:
            yield gauge("peermem_ready", "Whether the daemon takes work, as /readyz says.", (), [((), self._ready())])
            text = "Whether the policy file is refused, so that the policy before it stays in force."
            yield gauge("peermem_policy_refused", text, (), [((), self._refused())])
        if self._condition is not None:
            yield from _gauges(self._condition())


def _gauges(now: Condition) -> Iterator[Metric]:
    memory = now.memory
    limit = math.inf if memory.pin_limit is None else memory.pin_limit
    for name, text, value in (
        ("peermem_private_memory_bytes", "Memory of the daemon alone, without regions and buffers.", memory.private),
        ("peermem_pinned_memory_bytes", "Memory that the daemon holds pinned for NICs.", memory.pinned),
        ("peermem_pinned_memory_limit_bytes", "Memory that it may pin; +Inf without a limit.", limit),
        ("peermem_regions_limit", "Regions that the node may have at the same time.", now.most_regions),
    ):
        yield gauge(name, text, (), [((), value)])
    use = [((resource.value,), share) for resource, share in now.tenant_use.items()]
    text = "Highest use by any one tenant, as a share of its limit."
    yield gauge("peermem_tenant_highest_use_ratio", text, ("resource",), use)
    reach = [((each.device, each.kind, each.path.value, each.best.value, each.why), 1) for each in now.reach]
    text = "How regions of a device are reached, the best path of its kind, and the reason that keeps it from it."
    yield gauge("peermem_device_path_info", text, ("device", "kind", "path", "best", "why"), reach)
