"""The daemon's metrics: names, labels, buckets, a method for what happens. Those of NIC ports, the policy,
certificates, faults, loads and stores, the directory and the daemon's own condition have files of their own beside it.

Rules of this file:

* Names are peermem_..., in seconds and bytes; gRPC's are the de-facto grpc_server_....
* A label comes from a closed list: an enum, the reasons of core.errors, the methods of the contract, the
  devices of the configuration, the node's NICs. Never a name that a caller chose, never an address, never a key.
* Counters start at 0 for what is bound to happen, so that rates are right from the first event on.
* What has a current state is asked for when the page is made (`Snapshot`); what takes time, before (`refresh`).
* Bandwidth is the rate of a counter that moves while bytes move; there is no gauge of it.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import product

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from peermem.core.errors import Code, Internal, PeermemError
from peermem.core.plan import Direction
from peermem.core.transfer import State
from peermem.core.types import FabricKind, LeaseKind, Path
from peermem.offload import in_thread
from peermem.telemetry.certificates import CertificateMetrics
from peermem.telemetry.condition import ConditionMetrics
from peermem.telemetry.directory import DirectoryUse, directory_metrics
from peermem.telemetry.faults import FaultMetrics
from peermem.telemetry.gauges import gauge
from peermem.telemetry.history import History
from peermem.telemetry.nics import NicUse, nic_metrics
from peermem.telemetry.policy import PolicyMetrics
from peermem.telemetry.storage import StorageMetrics

DURATION_BUCKETS = tuple(float(f"{digit}e{power}") for power in range(-5, 3) for digit in (1, 2.5, 5))
"""10 us to 500 s."""
SIZE_BUCKETS = tuple(float(4**power) for power in range(19))
"""1 byte to 64 GiB."""
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
OPENMETRICS = "application/openmetrics-text"
OUTCOMES = {state: state.value.lower() for state in State if state.ended}
GRPC_CODES = frozenset(code.name for code in Code) | {"OK"}


class LeaseEnd(Enum):
    """Why a region was deleted without a call; values are metric labels."""

    CLIENT_EXIT = "client_exit"
    TTL = "ttl"


class Replayed(Enum):
    """What a repeated request_id had made; values are metric labels."""

    REGION = "region"
    TRANSFER = "transfer"
    STORAGE = "storage"


class LinkSide(Enum):
    """Who opened a link; values are metric labels."""

    OPENED = "opened"
    ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A device and the regions on it, now."""

    name: str
    kind: str
    path: Path
    size: int
    available: int
    regions: int
    region_bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is now."""

    devices: tuple[DeviceUse, ...]
    leases: Mapping[LeaseKind, int]
    running_transfers: int
    links: Mapping[tuple[FabricKind, LinkSide], int]
    grants_given: int
    """Grants that remote nodes hold on regions of this one."""
    grants_held: int
    """Grants that this node holds on regions of remote nodes."""
    attach_sessions: int
    rails_down: Mapping[FabricKind, int]
    """Rails of links to remote nodes that broke and are set aside."""
    rejected_connections: Mapping[FabricKind, int]
    """Connections to a fabric's port that were dropped since the start, because they showed no good secret."""
    verbs_objects: Mapping[str, int] = field(default_factory=dict)
    """Objects of the verbs fabric by their kind, such as qp or mr."""
    nics: Mapping[str, bool] = field(default_factory=dict)
    """NIC ports, such as mlx5_0/1, and whether the verbs fabric can use them."""
    paths: Mapping[tuple[str, str, Path], bool] = field(default_factory=dict)
    """Whether the last trial of a device with a NIC port, by this path, moved the right bytes."""
    directory: DirectoryUse | None = None


@dataclass(frozen=True, slots=True)
class GrpcMethod:
    """A method of the contract."""

    service: str
    """Full name, such as peermem.v1.NodeService."""
    method: str
    type: str
    """unary, client_stream, server_stream or bidi_stream."""


class Metrics:
    """The daemon's metrics, in a registry of their own unless one is given."""

    def __init__(self, version: str, registry: CollectorRegistry | None = None, node: str = "unnamed") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter
        self._registry = registry or CollectorRegistry()
        self._grpc_methods: dict[tuple[str, str], GrpcMethod] = {}
        self._state = _StateCollector()
        self._nics: Callable[[], Sequence[NicUse]] | None = None
        self._refreshing = asyncio.Lock()
        self._registry.register(self._state)
        self.condition = ConditionMetrics(self._registry)
        self.faults = FaultMetrics(self._registry)
        self._declare_transfers()
        self.history = History(self._bytes, self._transfers, self._duration)
        self.storage = StorageMetrics(self._registry, DURATION_BUCKETS)
        self._declare_others()
        self.policy = PolicyMetrics(self._registry)
        self.certificates = CertificateMetrics(self._registry)
        build = Info("peermem_build", "The daemon that answers.", registry=self._registry)
        build.info({"version": version, "python": platform.python_version(), "node": node})
        ProcessCollector(registry=self._registry)

    def _declare_transfers(self) -> None:
        self._transfers = self._counter(
            "peermem_transfers", "Transfers that ended.", "outcome", "direction", "fabric", "path"
        )
        self._failures = self._counter(
            "peermem_transfer_failures", "Transfers that failed, by reason.", "reason", "code"
        )
        self._refusals = self._counter(
            "peermem_transfer_refusals",
            "Transfers that were asked for on a pipeline and refused before they began, by reason.",
            "reason",
            "code",
        )
        self._bytes = self._counter(
            "peermem_transfer_bytes",
            "Bytes that transfers of this node moved.",
            "direction",
            "fabric",
            "path",
            "device",
        )
        self._moving: dict[tuple[Direction, FabricKind, Path, str], Counter] = {}
        self._duration = self._histogram(
            "peermem_transfer_duration_seconds",
            "Time from a transfer's acceptance to its end.",
            DURATION_BUCKETS,
            "outcome",
            "direction",
            "fabric",
        )
        self._size = self._histogram(
            "peermem_transfer_size_bytes",
            "Bytes that a transfer was asked to move.",
            SIZE_BUCKETS,
            "direction",
            "fabric",
        )
        for fault in PeermemError.by_reason.values():
            self._failures.labels(fault.reason, fault.code.name)
            self._refusals.labels(fault.reason, fault.code.name)
        self._start_transfers_at_zero(Direction.LOCAL, FabricKind.LOCAL, Path.HOST)
        self._start_transfers_at_zero(Direction.PUSH, FabricKind.TCP, Path.HOST)
        self._start_transfers_at_zero(Direction.PULL, FabricKind.TCP, Path.HOST)
        self._start_transfers_at_zero(Direction.RELAYED, None, None)

    def _start_transfers_at_zero(self, direction: Direction, fabric: FabricKind | None, path: Path | None) -> None:
        labels = direction.value, _label(fabric), _label(path)
        for outcome in OUTCOMES.values():
            self._transfers.labels(outcome, *labels)
        self._duration.labels(OUTCOMES[State.SUCCEEDED], *labels[:2])
        self._size.labels(*labels[:2])

    def _declare_others(self) -> None:
        self._lease_ends = self._counter(
            "peermem_lease_expirations", "Regions that were deleted because their lease ended.", "reason"
        )
        self._replays = self._counter(
            "peermem_idempotent_replays", "Requests that were answered from an earlier one's result.", "resource"
        )
        self._lag = self._histogram(
            "peermem_event_loop_lag_seconds", "How late the event loop ran a timer that was due.", LAG_BUCKETS
        )
        method = "grpc_type", "grpc_service", "grpc_method"
        self._grpc_count = self._counter("grpc_server_handled", "gRPC calls that ended.", *method, "grpc_code")
        self._grpc_duration = self._histogram(
            "grpc_server_handling_seconds", "Time that a gRPC call took.", DURATION_BUCKETS, *method
        )
        for end in LeaseEnd:
            self._lease_ends.labels(end.value)
        for replayed in Replayed:
            self._replays.labels(replayed.value)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(name, help_text, labels, registry=self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, help_text, labels, buckets=buckets, registry=self._registry)

    def serve_devices(self, devices: Mapping[str, Collection[Path]], fabrics: Collection[FabricKind]) -> None:
        """These devices are there, with the paths by which they may be reached, and these fabrics."""
        ways = [way for way in _WAYS if way[1] in fabrics]
        for (direction, fabric), (device, paths) in product(ways, devices.items()):
            for path in {*paths, Path.STAGED}:  # which it is also where the other end is
                self._bytes.labels(direction.value, fabric.value, path.value, device)
        for (direction, fabric), path in product(ways, {Path.STAGED}.union(*devices.values())):
            self._start_transfers_at_zero(direction, fabric, path)

    def transfer_bytes(self, direction: Direction, fabric: FabricKind, path: Path, device: str, count: int) -> None:
        """Some bytes of a running transfer are in place; `device` is that of the region here, the source's where both
        are, and `path` how it is reached."""
        known = self._moving.get((direction, fabric, path, device))
        if known is None:
            known = self._bytes.labels(direction.value, fabric.value, path.value, device)
            self._moving[direction, fabric, path, device] = known
        known.inc(count)

    def transfer_ended(
        self,
        outcome: State,
        reason: str | None,
        direction: Direction,
        fabric: FabricKind | None,
        path: Path | None,
        size: int,
        seconds: float,
        trace_id: str = "",
    ) -> None:
        """A transfer of `size` bytes ended. `reason` is that of its error, `trace_id` of the trace that has it.

        `fabric` and `path` are those of the first leg, or that it was to be tried over first where it ended before;
        None for a relayed transfer.
        """
        word, way = OUTCOMES[outcome], (direction.value, _label(fabric))
        self._transfers.labels(word, *way, _label(path)).inc()
        self._duration.labels(word, *way).observe(seconds, {"trace_id": trace_id} if trace_id else None)
        self._size.labels(*way).observe(size)
        if outcome is State.FAILED:
            fault = PeermemError.by_reason.get(reason or "", Internal)
            self._failures.labels(fault.reason, fault.code.name).inc()

    def transfer_refused(self, fault: PeermemError) -> None:
        """A transfer of a pipeline was not begun. Single calls are counted by their codes."""
        self._refusals.labels(fault.reason, fault.code.name).inc()

    def lease_ended(self, end: LeaseEnd) -> None:
        """A region was deleted because its lease ended."""
        self._lease_ends.labels(end.value).inc()

    def replayed(self, what: Replayed) -> None:
        """A request_id came again and got the first one's result."""
        self._replays.labels(what.value).inc()

    def event_loop_lag(self, seconds: float) -> None:
        """The event loop ran a timer so late."""
        self._lag.observe(seconds)

    def serve_grpc(self, methods: Iterable[GrpcMethod]) -> None:
        """These methods are served; calls of any others are counted as `unknown`."""
        self._start_calls_at_zero(_UNKNOWN_METHOD, _ALARMING)
        for method in methods:
            self._grpc_methods[method.service, method.method] = method
            self._start_calls_at_zero(method, ("OK", *_ALARMING))
            self._grpc_duration.labels(method.type, method.service, method.method)

    def _start_calls_at_zero(self, method: GrpcMethod, codes: Iterable[str]) -> None:
        for code in codes:
            self._grpc_count.labels(method.type, method.service, method.method, code)

    def grpc_handled(self, service: str, method: str, code: str, seconds: float) -> None:
        """A call ended with the canonical code of this name."""
        known = self._grpc_methods.get((service, method), _UNKNOWN_METHOD)
        labels = known.type, known.service, known.method
        self._grpc_count.labels(*labels, code if code in GRPC_CODES else Code.UNKNOWN.name).inc()
        self._grpc_duration.labels(*labels).observe(seconds)

    def observe(self, snapshot: Callable[[], Snapshot]) -> None:
        """Ask `snapshot` for the current state each time the page is made."""
        self._state.snapshot = snapshot

    def observe_nics(self, nics: Callable[[], Sequence[NicUse]]) -> None:
        """Ask `nics` for the NIC ports and their counters each time the page is refreshed, in a thread."""
        self._nics = nics

    async def refresh(self) -> None:
        """Read what takes time to read; without it the page shows what was read last."""
        if self._nics is not None:
            async with self._refreshing:  # however many ask, they take one thread
                self._state.nics = await in_thread(self._nics)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type: OpenMetrics for who accepts it, else Prometheus text."""
        # The caller's header goes no further: the library raises on versions that are no numbers, and echoes others.
        encode, content_type = choose_encoder(f"{OPENMETRICS}; version=1.0.0" if OPENMETRICS in accept else "")
        return encode(self._registry), content_type


class _StateCollector(Collector):
    """Gauges of what there is now; none before somebody can say."""

    snapshot: Callable[[], Snapshot] | None = None
    nics: Sequence[NicUse] = ()

    def collect(self) -> Iterator[Metric]:
        yield from nic_metrics(self.nics)
        if self.snapshot is None:
            return
        now = self.snapshot()
        yield from _device_gauges(now.devices)
        if now.directory is not None:
            yield from directory_metrics(now.directory)
        leases = [((kind.value,), now.leases.get(kind, 0)) for kind in LeaseKind]
        yield gauge("peermem_leases", "Regions by what keeps them alive.", ("kind",), leases)
        links = [((fabric.value, side.value), count) for (fabric, side), count in now.links.items()]
        yield gauge("peermem_links", "Open links, by who opened them.", ("fabric", "side"), links)
        grants = [(("given",), now.grants_given), (("held",), now.grants_held)]
        yield gauge("peermem_grants", "Grants, given to remote nodes and held from them.", ("side",), grants)
        yield gauge("peermem_running_transfers", "Transfers that have not ended.", (), [((), now.running_transfers)])
        rails = [((fabric.value,), count) for fabric, count in now.rails_down.items()]
        yield gauge("peermem_rails_down", "Rails that broke and are set aside.", ("fabric",), rails)
        yield gauge("peermem_attach_sessions", "Jobs on the attach socket.", (), [((), now.attach_sessions)])
        rejected = CounterMetricFamily(
            "peermem_fabric_connections_rejected",
            "Connections that proved no good secret, or carried what was forged.",
            labels=("fabric",),
        )
        for fabric, count in now.rejected_connections.items():
            rejected.add_metric((fabric.value,), count)
        yield rejected
        objects = [((kind,), count) for kind, count in now.verbs_objects.items()]
        yield gauge("peermem_verbs_objects", "Objects of the verbs fabric.", ("kind",), objects)
        nics = [(name.partition("/")[::2], int(works)) for name, works in now.nics.items()]
        yield gauge("peermem_nic_works", "Whether the verbs fabric can use a NIC port.", ("device", "port"), nics)
        paths = [((device, nic, path.value), int(works)) for (device, nic, path), works in now.paths.items()]
        text = "Whether the last trial of a device with a NIC port moved the right bytes."
        yield gauge("peermem_path_works", text, ("device", "nic", "path"), paths)


def _device_gauges(devices: tuple[DeviceUse, ...]) -> Iterator[Metric]:
    labels = "device", "kind", "path"
    keys = [(device.name, device.kind, device.path.value) for device in devices]
    for name, help_text, values in (
        ("peermem_regions", "Regions on a device.", [device.regions for device in devices]),
        ("peermem_region_bytes", "Bytes of the regions on a device.", [device.region_bytes for device in devices]),
        ("peermem_device_size_bytes", "Bytes of a device.", [device.size for device in devices]),
        ("peermem_device_available_bytes", "Bytes not held by regions.", [device.available for device in devices]),
    ):
        yield gauge(name, help_text, labels, zip(keys, values, strict=True))


_WAYS = (
    (Direction.LOCAL, FabricKind.LOCAL),
    *product((Direction.PUSH, Direction.PULL), (FabricKind.TCP, FabricKind.VERBS)),
)
_ALARMING = (Code.INTERNAL.name, Code.UNKNOWN.name, Code.UNAUTHENTICATED.name)
"""Codes of calls that alerts look for: the first one of a method is to be seen, too."""
_UNKNOWN_METHOD = GrpcMethod("unknown", "unknown", "unknown")


def _label(value: FabricKind | Path | None) -> str:
    return value.value if value else "none"
