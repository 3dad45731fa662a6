"""From the contract's messages to core values and back; the only place where the two meet.

Every message may come from a hostile socket: `*_from_proto` raise InvalidField and its like, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from peermem.core import region as core_region
from peermem.core import transfer as core_transfer
from peermem.core.errors import InvalidField, PeermemError
from peermem.core.names import parse_node, parse_region, parse_transfer
from peermem.core.node import DeviceFacts, NicPort, NodeDevice, NodeFacts
from peermem.core.plan import Direction
from peermem.core.preflight import Verdict
from peermem.core.segments import SegmentList, Stride, check_count, check_possible, columns, strided
from peermem.core.spans import traceparent
from peermem.core.storage import Order, StorageFacts, StorageRequest
from peermem.core.types import FabricKind, LeaseKind, Path
from peermem.v1 import error_pb2, node_pb2, region_pb2, transfer_pb2

T = TypeVar("T")

MAX_LISTS = 1024
"""Segment lists of one transfer."""

FABRICS = {
    FabricKind.VERBS: transfer_pb2.FABRIC_VERBS,
    FabricKind.TCP: transfer_pb2.FABRIC_TCP,
    FabricKind.LOCAL: transfer_pb2.FABRIC_LOCAL,
}
PATHS = {path: region_pb2.Path.Value(f"PATH_{path.value}") for path in Path}
_DIRECTIONS = {way: transfer_pb2.Direction.Value(f"DIRECTION_{way.name}") for way in Direction}
_STATES = {state: transfer_pb2.TransferState.Value(f"TRANSFER_STATE_{state.value}") for state in core_transfer.State}
_LEASES = {kind: region_pb2.LeaseKind.Value(f"LEASE_KIND_{kind.name}") for kind in LeaseKind}
_REGION_STATES = {
    core_region.State.READY: region_pb2.REGION_STATE_READY,
    core_region.State.DRAINING: region_pb2.REGION_STATE_DRAINING,
    core_region.State.REVOKED: region_pb2.REGION_STATE_REVOKED,
}


def error_to_proto(error: PeermemError) -> error_pb2.Error:
    """Return the message for a fault."""
    return error_pb2.Error(
        code=int(error.code), reason=error.reason, message=error.message, metadata=dict(error.metadata)
    )


def error_from_proto(message: error_pb2.Error) -> PeermemError:
    """Return the fault that a message describes."""
    return PeermemError.restore(message.reason, message.message, dict(message.metadata))


def duration_to_proto(seconds: float) -> Duration:
    """Return `seconds` as a message."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def duration_from_proto(message: Duration, field: str, low: float, high: float) -> float:
    """Return seconds. Raises InvalidField outside `low` to `high`."""
    seconds = message.seconds + message.nanos / 1e9
    if not low <= seconds <= high:
        raise InvalidField(f"{field} of {seconds:g} s must be {low:g} s to {high:g} s.", field=field)
    return seconds


def time_to_proto(unix: float) -> Timestamp:
    """Return a Unix time as a message."""
    message = Timestamp()
    message.FromNanoseconds(round(unix * 1e9))
    return message


def fabric_from_proto(value: transfer_pb2.Fabric.ValueType, field: str = "fabric") -> FabricKind | None:
    """Return the fabric, None for unspecified. Raises InvalidField."""
    return _pick({transfer_pb2.FABRIC_UNSPECIFIED: None, **{v: k for k, v in FABRICS.items()}}, value, field)


def lease_from_proto(message: region_pb2.Lease) -> core_region.Lease | None:
    """Return the lease asked for, None for unspecified. Raises InvalidField."""
    if message.kind == region_pb2.LEASE_KIND_UNSPECIFIED:
        return None
    kind = _pick({value: key for key, value in _LEASES.items()}, message.kind, "lease.kind")
    if kind is not LeaseKind.TTL:
        return core_region.Lease(kind)
    return core_region.Lease(
        kind, duration_from_proto(message.ttl, "lease.ttl", core_region.MIN_TTL, core_region.MAX_TTL)
    )


def lease_to_proto(lease: core_region.Lease, expires_at: float | None) -> region_pb2.Lease:
    """Return the message for a lease that ends at the Unix time `expires_at`."""
    message = region_pb2.Lease(kind=_LEASES[lease.kind])
    if expires_at is not None:
        message.ttl.CopyFrom(duration_to_proto(lease.ttl))
        message.expire_time.CopyFrom(time_to_proto(expires_at))
    return message


def region_to_proto(facts: core_region.RegionFacts) -> region_pb2.Region:
    """Return the message for a region."""
    return region_pb2.Region(
        name=str(facts.name),
        length=facts.length,
        device=facts.device,
        owner=facts.owner,
        labels=dict(facts.labels),
        lease=lease_to_proto(facts.lease, facts.expires_at),
        path=PATHS[facts.path],
        state=_REGION_STATES[facts.state],
        create_time=time_to_proto(facts.created_at),
        nics=facts.nics,
        why=facts.why,
        slurm_job=facts.origin.slurm_job,
        pod=facts.origin.pod,
        published=facts.published,
    )


def published_to_proto(region: core_region.PublishedRegion) -> region_pb2.PublishedRegion:
    """Return the message for a published region."""
    return region_pb2.PublishedRegion(
        name=str(region.name),
        length=region.length,
        device_kind=region.device_kind,
        path=PATHS[region.path],
        labels=dict(region.labels),
    )


def load_request_from_proto(message: region_pb2.LoadRegionRequest) -> StorageRequest:
    """Return what is asked for. Raises InvalidField."""
    return _storage_request(message, Order.LOAD, message.file_offset)


def store_request_from_proto(message: region_pb2.StoreRegionRequest) -> StorageRequest:
    """Return what is asked for. Raises InvalidField."""
    offset = message.file_offset if message.HasField("file_offset") else None
    return _storage_request(message, Order.STORE, offset)


def storage_to_proto(facts: StorageFacts) -> region_pb2.StorageProgress:
    """Return the message for a load or store as it stands."""
    return region_pb2.StorageProgress(
        bytes_total=facts.bytes_total,
        bytes_done=facts.bytes_done,
        way=region_pb2.StorageWay.Value(f"STORAGE_WAY_{facts.way.value if facts.way else 'UNSPECIFIED'}"),
        why=facts.why,
        duration=None if facts.duration is None else duration_to_proto(facts.duration),
        crc32c=facts.crc32c,
    )


def transfer_request_from_proto(
    message: transfer_pb2.CreateTransferRequest, max_segments: int
) -> core_transfer.TransferRequest:
    """Return what is asked for.

    Raises InvalidField, ZeroLength, SegmentsMismatch, SegmentsOverlap, OutOfRange.
    """
    if not 1 <= len(message.segments) <= MAX_LISTS:
        raise InvalidField(f"segments must hold 1 to {MAX_LISTS} lists, not {len(message.segments)}.", field="segments")
    lists: list[SegmentList] = []
    left = max_segments
    for entry in message.segments:
        lists.append(_list_from_proto(entry, left))
        left -= len(lists[-1].lengths)
    check_possible(sum(entry.total for entry in lists))
    timeout = None
    if message.HasField("timeout"):
        timeout = duration_from_proto(message.timeout, "timeout", 0.001, 7 * 86400.0)
    return core_transfer.TransferRequest(
        lists, timeout, message.checksum, fabric_from_proto(message.fabric), traceparent(message.traceparent)
    )


def transfer_request_to_proto(
    request: core_transfer.TransferRequest, request_id: str
) -> transfer_pb2.CreateTransferRequest:
    """Return the message that asks another daemon for the same."""
    message = transfer_pb2.CreateTransferRequest(
        request_id=request_id,
        segments=[_list_to_proto(entry) for entry in request.lists],
        checksum=request.checksum,
        fabric=FABRICS[request.fabric] if request.fabric else transfer_pb2.FABRIC_UNSPECIFIED,
        traceparent=request.traceparent,
    )
    if request.timeout is not None:
        message.timeout.CopyFrom(duration_to_proto(request.timeout))
    return message


def transfer_to_proto(facts: core_transfer.TransferFacts) -> transfer_pb2.Transfer:
    """Return the message for a transfer."""
    message = transfer_pb2.Transfer(
        name=str(facts.name),
        state=_STATES[facts.state],
        bytes_total=facts.bytes_total,
        bytes_done=facts.bytes_done,
        segment_count=facts.segment_count,
        fabric=FABRICS[facts.fabric] if facts.fabric else transfer_pb2.FABRIC_UNSPECIFIED,
        direction=_DIRECTIONS[facts.direction],
        owner=facts.owner,
        create_time=time_to_proto(facts.created_at),
        crc32c=facts.crc32c,
        executed_by=facts.executed_by,
        path=PATHS[facts.path] if facts.path else region_pb2.PATH_UNSPECIFIED,
        fabric_why=facts.fabric_why,
    )
    if facts.error is not None:
        message.error.CopyFrom(error_to_proto(facts.error))
    if facts.duration is not None:
        message.duration.CopyFrom(duration_to_proto(facts.duration))
        message.end_time.CopyFrom(time_to_proto(facts.created_at + facts.duration))
    return message


def transfer_from_proto(message: transfer_pb2.Transfer) -> core_transfer.TransferFacts:
    """Return a transfer as another daemon told it. Raises InvalidField."""
    return core_transfer.TransferFacts(
        name=parse_transfer(message.name),
        state=_pick({value: key for key, value in _STATES.items()}, message.state, "state"),
        bytes_total=message.bytes_total,
        bytes_done=message.bytes_done,
        segment_count=message.segment_count,
        fabric=fabric_from_proto(message.fabric),
        direction=_pick({value: key for key, value in _DIRECTIONS.items()}, message.direction, "direction"),
        owner=message.owner,
        error=error_from_proto(message.error) if message.HasField("error") else None,
        created_at=message.create_time.ToNanoseconds() / 1e9,
        duration=message.duration.ToNanoseconds() / 1e9 if message.HasField("duration") else None,
        crc32c=message.crc32c if message.HasField("crc32c") else None,
        path=next((path for path, value in PATHS.items() if value == message.path), None),
        executed_by=message.executed_by,
        fabric_why=message.fabric_why,
    )


def node_to_proto(facts: NodeFacts) -> node_pb2.Node:
    """Return the message for a node."""
    return node_pb2.Node(
        name=f"nodes/{facts.node}",
        address=facts.address,
        epoch=facts.epoch,
        version=facts.version,
        fabrics=[FABRICS[kind] for kind in facts.fabrics],
        start_time=time_to_proto(facts.started_at) if facts.started_at else None,
        region_count=facts.region_count,
        region_bytes=facts.region_bytes,
        running_transfer_count=facts.running_transfer_count,
        link_count=facts.link_count,
        grant_count=facts.grant_count,
        nics=facts.nics,
        devices=[node_pb2.NodeDevice(name=each.name, kind=each.kind, size=each.size) for each in facts.devices],
        state=node_pb2.NodeState.Value(f"NODE_STATE_{facts.state.value}"),
        state_time=time_to_proto(facts.since) if facts.since else None,
        links_here_count=facts.links_here,
    )


def node_from_proto(message: node_pb2.Node) -> NodeFacts:
    """Return a node as another daemon told it. Raises InvalidField."""
    kinds = {value: key for key, value in FABRICS.items()}
    return NodeFacts(
        node=parse_node(message.name),
        address=message.address,
        epoch=message.epoch,
        version=message.version,
        fabrics=tuple(kinds[value] for value in message.fabrics if value in kinds),
        started_at=message.start_time.ToNanoseconds() / 1e9,
        region_count=message.region_count,
        region_bytes=message.region_bytes,
        running_transfer_count=message.running_transfer_count,
        link_count=message.link_count,
        grant_count=message.grant_count,
        nics=tuple(message.nics),
        devices=tuple(NodeDevice(each.name, each.kind, each.size) for each in message.devices),
    )


def device_to_proto(facts: DeviceFacts) -> node_pb2.Device:
    """Return the message for a device."""
    return node_pb2.Device(
        name=facts.name,
        kind=facts.kind,
        size=facts.size,
        available=facts.available,
        path=PATHS[facts.path],
        region_count=facts.region_count,
        pci_address=facts.pci_address,
        nics=facts.nics,
        why=facts.why,
    )


def nic_to_proto(port: NicPort, error: PeermemError | None) -> node_pb2.Nic:
    """Return the message for a NIC port that works, or that `error` keeps from working."""
    return node_pb2.Nic(
        name=port.name,
        state=port.state,
        link_layer=port.link_layer,
        rate=port.rate,
        numa_node=port.numa_node,
        pci_address=port.pci_address,
        gids=map(str, port.gids),
        error=error_to_proto(error) if error is not None else None,
    )


def verdict_to_proto(verdict: Verdict, done: int, total: int) -> node_pb2.PreflightVerdict:
    """Return the message for a finding of preflight, the one after which `done` of `total` are done."""
    message = node_pb2.PreflightVerdict(
        device=verdict.device,
        fabric=transfer_pb2.FABRIC_VERBS if verdict.nic else transfer_pb2.FABRIC_UNSPECIFIED,
        path=PATHS[verdict.path] if verdict.path else region_pb2.PATH_UNSPECIFIED,
        works=verdict.error is None,
        write_bandwidth=round(verdict.write_bandwidth),
        read_bandwidth=round(verdict.read_bandwidth),
        nic=verdict.nic,
        check=verdict.check.value if verdict.check else "",
        detail=verdict.detail,
        advice=verdict.advice,
        done=done,
        total=total,
    )
    if verdict.error is not None:
        message.error.CopyFrom(error_to_proto(verdict.error))
    elif verdict.device:
        message.latency.CopyFrom(duration_to_proto(verdict.latency))
    return message


def _storage_request(
    message: region_pb2.LoadRegionRequest | region_pb2.StoreRegionRequest, order: Order, file_offset: int | None
) -> StorageRequest:
    if (file_offset or 0) + message.length >= 1 << 63:
        raise InvalidField("file_offset and length reach beyond what a file can have.", field="file_offset")
    return StorageRequest(
        order=order,
        region=parse_region(message.name),
        region_offset=message.offset,
        path=message.path,
        file_offset=file_offset,
        length=message.length,
        checksum=message.checksum,
    )


def _list_from_proto(message: transfer_pb2.SegmentList, limit: int) -> SegmentList:
    source = parse_region(message.source, "segments.source")
    destination = parse_region(message.destination, "segments.destination")
    if message.HasField("ranges"):
        ranges = message.ranges
        check_count(max(map(len, (ranges.source_offsets, ranges.destination_offsets, ranges.lengths))), limit)
        return columns(
            source,
            destination,
            tuple(ranges.source_offsets),
            tuple(ranges.destination_offsets),
            tuple(ranges.lengths),
        )
    if not message.HasField("strided"):
        raise InvalidField("segments has neither ranges nor strided.", field="segments.layout")
    stride = message.strided
    read = Stride(stride.source_offset, stride.source_stride)
    write = Stride(stride.destination_offset, stride.destination_stride)
    return strided(source, destination, read, write, stride.length, stride.count, limit)


def _list_to_proto(entry: SegmentList) -> transfer_pb2.SegmentList:
    ranges = transfer_pb2.Ranges(
        source_offsets=entry.source_offsets, destination_offsets=entry.destination_offsets, lengths=entry.lengths
    )
    return transfer_pb2.SegmentList(source=str(entry.source), destination=str(entry.destination), ranges=ranges)


def _pick(table: dict[int, T], value: int, field: str) -> T:
    if value not in table:
        raise InvalidField(f"{field} has the value {value}, which this daemon does not know.", field=field)
    return table[value]


def labels_from_proto(labels: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return a region's labels. Raises InvalidField for more than 16 or for ones that are too long."""
    if len(labels) > 16:
        raise InvalidField(f"{len(labels)} labels are given; a region has at most 16.", field="labels")
    for key, value in labels:
        if not 1 <= len(key.encode()) <= 63 or len(value.encode()) > 63:
            raise InvalidField(
                f"Label {key[:80]!r} must have a key of 1 to 63 and a value of at most 63 bytes.", field="labels"
            )
    return dict(labels)
