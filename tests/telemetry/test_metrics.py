"""The metrics page: what is on it after what happened, and whether Prometheus' own tool likes it."""

import asyncio
import itertools
import shutil
import subprocess
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry
from tests.telemetry.test_condition import CONDITION

from peermem.core.errors import NodeUnreachable, PeermemError, TransferCancelled
from peermem.core.plan import Direction
from peermem.core.storage import Order, StorageFacts, Way
from peermem.core.transfer import State
from peermem.core.types import FabricKind, LeaseKind, Path
from peermem.telemetry.certificates import Whose
from peermem.telemetry.lag import watch_event_loop
from peermem.telemetry.metrics import (
    DURATION_BUCKETS,
    SIZE_BUCKETS,
    DeviceUse,
    GrpcMethod,
    LeaseEnd,
    LinkSide,
    Metrics,
    Replayed,
    Snapshot,
)

Read = Callable[..., float | None]
PUSH = {"direction": "push", "fabric": "tcp"}
SNAPSHOT = Snapshot(
    devices=(DeviceUse("memfd0", "memfd", Path.HOST, size=1000, available=600, regions=3, region_bytes=400),),
    leases={LeaseKind.TTL: 2},
    running_transfers=5,
    links={(FabricKind.TCP, LinkSide.OPENED): 1, (FabricKind.TCP, LinkSide.ACCEPTED): 2},
    grants_given=7,
    grants_held=8,
    attach_sessions=4,
    rails_down={FabricKind.TCP: 2},
    rejected_connections={FabricKind.TCP: 9},
    verbs_objects={"qp": 2, "mr": 3},
    nics={"mlx5_0/1": True, "mlx5_1/1": False},
    paths={("bar0", "mlx5_0/1", Path.P2PDMA): True, ("bar1", "mlx5_0/1", Path.STAGED): False},
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics("1.2.3", registry)


@pytest.fixture
def read(registry: CollectorRegistry) -> Read:
    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    return value


def lines(metrics: Metrics) -> list[str]:
    return metrics.render()[0].decode().splitlines()


def everything(metrics: Metrics) -> None:
    """Let everything happen once."""
    metrics.observe(lambda: SNAPSHOT)
    metrics.condition.observe_health(lambda: True, lambda: False)
    metrics.condition.observe(lambda: CONDITION)
    metrics.transfer_bytes(Direction.PUSH, FabricKind.TCP, Path.HOST, "bar0", 10)
    metrics.certificates.observe(lambda: {Whose.NODE: 1.8e9, Whose.AUTHORITY: 1.9e9})
    metrics.transfer_ended(State.SUCCEEDED, None, Direction.PUSH, FabricKind.TCP, Path.HOST, 1, 0.1)
    metrics.transfer_ended(State.FAILED, "TIMEOUT", Direction.RELAYED, None, None, 1, 0.1)
    metrics.storage.moved(Order.LOAD, Way.DIRECT, 10)
    metrics.storage.ended(Order.STORE, StorageFacts(way=Way.STAGED, duration=0.1), NodeUnreachable("x"))
    metrics.lease_ended(LeaseEnd.TTL)
    metrics.replayed(Replayed.REGION)
    metrics.event_loop_lag(0.1)
    metrics.serve_grpc([GrpcMethod("peermem.v1.NodeService", "GetNode", "unary")])
    metrics.grpc_handled("peermem.v1.NodeService", "GetNode", "OK", 0.1)


def test_what_is_bound_to_happen_starts_at_zero(metrics: Metrics, read: Read) -> None:
    for outcome in ("succeeded", "failed", "cancelled"):
        for direction, fabric in (("local", "local"), ("push", "tcp"), ("pull", "tcp")):
            labels = {"outcome": outcome, "direction": direction, "fabric": fabric, "path": "HOST"}
            assert read("peermem_transfers_total", **labels) == 0
        assert read("peermem_transfers_total", outcome=outcome, direction="relayed", fabric="none", path="none") == 0
    for order, way in itertools.product(("load", "store"), ("DIRECT", "STAGED", "BUFFERED", "none")):
        assert read("peermem_storage_operations_total", operation=order, outcome="failed", way=way) == 0
    metrics.serve_grpc([GrpcMethod("peermem.v1.NodeService", "GetNode", "unary")])
    for method in (("unary", "peermem.v1.NodeService", "GetNode"), ("unknown", "unknown", "unknown")):
        labels = dict(zip(("grpc_type", "grpc_service", "grpc_method"), method, strict=True))
        for code in ("INTERNAL", "UNKNOWN", "UNAUTHENTICATED"):  # which alerts look for
            assert read("grpc_server_handled_total", grpc_code=code, **labels) == 0
    for reason, fault in PeermemError.by_reason.items():
        assert read("peermem_transfer_failures_total", reason=reason, code=fault.code.name) == 0
    assert read("peermem_lease_expirations_total", reason="client_exit") == 0
    assert read("peermem_idempotent_replays_total", resource="transfer") == 0


def test_what_devices_and_fabrics_are_bound_to_move_starts_at_zero(metrics: Metrics, read: Read) -> None:
    metrics.serve_devices({"bar0": (Path.P2PDMA, Path.STAGED), "memfd0": (Path.HOST,)}, list(FabricKind))
    ways = (("local", "local"), ("push", "tcp"), ("pull", "tcp"), ("push", "verbs"), ("pull", "verbs"))
    for (direction, fabric), path in itertools.product(ways, ("HOST", "P2PDMA", "STAGED")):
        way = {"direction": direction, "fabric": fabric}
        device = "memfd0" if path == "HOST" else "bar0"
        assert read("peermem_transfer_bytes_total", path=path, device=device, **way) == 0
        for outcome in ("succeeded", "failed", "cancelled"):
            assert read("peermem_transfers_total", outcome=outcome, path=path, **way) == 0
        assert read("peermem_transfer_duration_seconds_count", outcome="succeeded", **way) == 0
        assert read("peermem_transfer_size_bytes_count", **way) == 0
    assert read("peermem_transfer_bytes_total", path="STAGED", device="memfd0", **PUSH) == 0  # its other end is
    assert read("peermem_transfer_bytes_total", path="P2PDMA", device="memfd0", **PUSH) is None


def test_a_fabric_that_is_not_there_has_no_series(metrics: Metrics) -> None:
    metrics.serve_devices({"memfd0": (Path.HOST,)}, (FabricKind.TCP, FabricKind.LOCAL))
    assert not any('fabric="verbs"' in line for line in lines(metrics) if line.startswith("peermem_transfer"))


def test_loads_and_stores(metrics: Metrics, read: Read) -> None:
    assert read("peermem_storage_bytes_total", operation="store", way="BUFFERED") == 0
    metrics.storage.moved(Order.LOAD, Way.DIRECT, 100)
    assert read("peermem_storage_bytes_total", operation="load", way="DIRECT") == 100
    facts = StorageFacts(way=Way.DIRECT, duration=0.1)
    for error in (None, NodeUnreachable("x"), TransferCancelled("x")):
        metrics.storage.ended(Order.LOAD, facts, error)
    metrics.storage.ended(Order.LOAD, StorageFacts(), NodeUnreachable("x"))
    for outcome, way, count in (
        ("succeeded", "DIRECT", 1),
        ("failed", "DIRECT", 1),
        ("cancelled", "DIRECT", 1),
        ("failed", "none", 1),
    ):
        labels = {"operation": "load", "outcome": outcome, "way": way}
        assert read("peermem_storage_operations_total", **labels) == count
    assert read("peermem_storage_failures_total", operation="load", reason="NODE_UNREACHABLE", code="UNAVAILABLE") == 2
    assert read("peermem_storage_duration_seconds_count", operation="load", outcome="succeeded") == 1


def test_bytes_count_while_they_move(metrics: Metrics, read: Read) -> None:
    metrics.transfer_bytes(Direction.PUSH, FabricKind.TCP, Path.HOST, "bar0", 100)
    metrics.transfer_bytes(Direction.PUSH, FabricKind.TCP, Path.HOST, "bar0", 1 << 40)
    assert read("peermem_transfer_bytes_total", path="HOST", device="bar0", **PUSH) == 100 + (1 << 40)
    assert read("peermem_transfers_total", outcome="succeeded", path="HOST", **PUSH) == 0


def test_a_transfer_that_succeeded(metrics: Metrics, read: Read) -> None:
    metrics.transfer_ended(State.SUCCEEDED, None, Direction.PUSH, FabricKind.TCP, Path.STAGED, 4096, 0.0002)
    assert read("peermem_transfers_total", outcome="succeeded", path="STAGED", **PUSH) == 1
    assert read("peermem_transfer_size_bytes_sum", **PUSH) == 4096
    assert read("peermem_transfer_size_bytes_bucket", le="4096.0", **PUSH) == 1
    assert read("peermem_transfer_duration_seconds_bucket", outcome="succeeded", le="0.0001", **PUSH) == 0
    assert read("peermem_transfer_duration_seconds_bucket", outcome="succeeded", le="0.00025", **PUSH) == 1


@pytest.mark.parametrize(
    ("reason", "counted"),
    [(NodeUnreachable.reason, "NODE_UNREACHABLE"), ("made up by a remote node", "INTERNAL"), (None, "INTERNAL")],
)
def test_a_transfer_that_failed_counts_its_reason_from_the_one_list(
    metrics: Metrics, read: Read, reason: str | None, counted: str
) -> None:
    metrics.transfer_ended(State.FAILED, reason, Direction.PUSH, FabricKind.TCP, Path.HOST, 1, 1.0)
    assert read("peermem_transfers_total", outcome="failed", path="HOST", **PUSH) == 1
    code = PeermemError.by_reason[counted].code.name
    assert read("peermem_transfer_failures_total", reason=counted, code=code) == 1
    assert "made up" not in "".join(lines(metrics))


def test_a_cancelled_transfer_is_no_failure(metrics: Metrics, read: Read) -> None:
    metrics.transfer_ended(State.CANCELLED, TransferCancelled.reason, Direction.RELAYED, None, None, 1, 1.0)
    labels = {"direction": "relayed", "fabric": "none"}
    assert read("peermem_transfers_total", outcome="cancelled", path="none", **labels) == 1
    assert read("peermem_transfer_failures_total", reason=TransferCancelled.reason, code="CANCELLED") == 0


def test_a_transfer_that_runs_has_no_outcome(metrics: Metrics) -> None:
    with pytest.raises(KeyError):
        metrics.transfer_ended(State.RUNNING, None, Direction.PUSH, FabricKind.TCP, Path.HOST, 1, 1.0)


def test_calls_of_the_contract_and_of_others(metrics: Metrics, read: Read) -> None:
    metrics.serve_grpc([GrpcMethod("peermem.v1.NodeService", "GetNode", "unary")])
    labels = {"grpc_type": "unary", "grpc_service": "peermem.v1.NodeService", "grpc_method": "GetNode"}
    assert read("grpc_server_handled_total", grpc_code="OK", **labels) == 0
    metrics.grpc_handled("peermem.v1.NodeService", "GetNode", "NOT_FOUND", 0.5)
    assert read("grpc_server_handled_total", grpc_code="NOT_FOUND", **labels) == 1
    assert read("grpc_server_handling_seconds_sum", **labels) == 0.5
    for i in range(100):
        metrics.grpc_handled(f"stranger{i}", "Get", f"CODE{i}", 0.5)
    unknown = {"grpc_type": "unknown", "grpc_service": "unknown", "grpc_method": "unknown"}
    assert read("grpc_server_handled_total", grpc_code="UNKNOWN", **unknown) == 100
    assert "stranger" not in "".join(lines(metrics))


def test_the_current_state_is_asked_for_each_time(metrics: Metrics, read: Read) -> None:
    assert read("peermem_running_transfers") is None
    metrics.observe(lambda: SNAPSHOT)
    device = {"device": "memfd0", "kind": "memfd", "path": "HOST"}
    assert read("peermem_regions", **device) == 3
    assert read("peermem_region_bytes", **device) == 400
    assert read("peermem_device_size_bytes", **device) == 1000
    assert read("peermem_device_available_bytes", **device) == 600
    assert [read("peermem_leases", kind=kind) for kind in ("none", "session", "ttl")] == [0, 0, 2]
    assert [read("peermem_links", fabric="tcp", side=side) for side in ("opened", "accepted")] == [1, 2]
    assert [read("peermem_grants", side=side) for side in ("given", "held")] == [7, 8]
    assert (read("peermem_running_transfers"), read("peermem_attach_sessions")) == (5, 4)
    assert read("peermem_fabric_connections_rejected_total", fabric="tcp") == 9
    assert [read("peermem_verbs_objects", kind=kind) for kind in ("qp", "mr")] == [2, 3]
    assert [read("peermem_nic_works", device=device, port="1") for device in ("mlx5_0", "mlx5_1")] == [1, 0]
    assert read("peermem_path_works", device="bar0", nic="mlx5_0/1", path="P2PDMA") == 1
    assert read("peermem_path_works", device="bar1", nic="mlx5_0/1", path="STAGED") == 0
    metrics.observe(lambda: Snapshot((), {}, 6, {}, 0, 0, 0, {}, {}))
    assert read("peermem_running_transfers") == 6
    assert read("peermem_regions", **device) is None


def test_when_certificates_end_is_asked_for_each_time(metrics: Metrics, read: Read) -> None:
    name = "peermem_tls_certificate_expiry_timestamp_seconds"
    assert read(name, certificate="node") is None
    for end in (1.8e9, 1.9e9):
        metrics.certificates.observe(lambda end=end: {Whose.NODE: end, Whose.AUTHORITY: 2.1e9})  # type: ignore[misc]
        assert [read(name, certificate=whose) for whose in ("node", "authority")] == [end, 2.1e9]


def test_what_else_is_counted(metrics: Metrics, read: Read) -> None:
    metrics.lease_ended(LeaseEnd.CLIENT_EXIT)
    metrics.replayed(Replayed.TRANSFER)
    assert read("peermem_lease_expirations_total", reason="client_exit") == 1
    assert read("peermem_idempotent_replays_total", resource="transfer") == 1


def test_the_build_and_the_process(metrics: Metrics) -> None:
    page = lines(metrics)
    assert any(line.startswith("peermem_build_info{") and 'version="1.2.3"' in line for line in page)
    assert any(line.startswith("process_open_fds ") for line in page)


def test_buckets_reach_from_microseconds_to_minutes_and_from_a_byte_to_64_gib() -> None:
    assert DURATION_BUCKETS[0] <= 10e-6
    assert DURATION_BUCKETS[-1] >= 300
    assert all(2 <= high / low <= 2.5 for low, high in itertools.pairwise(DURATION_BUCKETS))
    assert (SIZE_BUCKETS[0], SIZE_BUCKETS[-1]) == (1, 64 << 30)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/plain;version=x", "text/plain; version=0.0.4"),
        (
            "application/openmetrics-text; version=1.0.0; q=0.5, text/plain",
            "application/openmetrics-text; version=1.0.0",
        ),
        ("application/openmetrics-text; version=evil", "application/openmetrics-text; version=1.0.0"),
    ],
)
def test_the_form_of_the_page(metrics: Metrics, accept: str, content_type: str) -> None:
    everything(metrics)
    page, given = metrics.render(accept)
    assert given.startswith(content_type)
    assert page.endswith(b"# EOF\n") == ("openmetrics" in content_type)


def test_each_sample_of_a_metric_has_all_its_labels_and_each_name_its_prefix(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    everything(metrics)
    for family in registry.collect():
        assert family.name.startswith(("peermem_", "grpc_server_", "process_"))
        labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
        assert len(labels) == 1, family.name
        assert all(value for sample in family.samples for value in sample.labels.values())


def test_two_daemons_in_one_process_share_nothing() -> None:
    Metrics("1").lease_ended(LeaseEnd.TTL)
    assert 'peermem_lease_expirations_total{reason="ttl"} 0.0' in lines(Metrics("1"))


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")
def test_promtool_finds_nothing_to_say(metrics: Metrics) -> None:
    everything(metrics)
    done = subprocess.run(["promtool", "check", "metrics"], input=metrics.render()[0], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_the_lag_of_the_event_loop_is_measured(metrics: Metrics, read: Read) -> None:
    watcher = asyncio.create_task(watch_event_loop(metrics, interval=0.001))
    async with asyncio.timeout(10):
        while not read("peermem_event_loop_lag_seconds_count"):  # noqa: ASYNC110  nobody is told of a sample
            await asyncio.sleep(0.001)
    watcher.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watcher
