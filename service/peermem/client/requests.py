"""Requests of the contract, built from what a program says.

Rules of this file:

* Pure, apart from the random part of a request_id.
* Sizes and durations are taken as numbers or as people write them (`64MiB`, `30s`); a wrong one is InvalidField.
* Every mutating request gets a request_id, so that gRPC may repeat it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from peermem.client.facts import Device
from peermem.client.tensors import GpuRange
from peermem.core.errors import DeviceNotFound, InvalidField, OutOfRange
from peermem.core.types import FabricKind
from peermem.core.units import parse_duration, parse_size
from peermem.v1 import region_pb2, transfer_pb2

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 1 << 20
"""Bytes of one WriteRegion message, as large as the contract allows."""

Time = float | str
"""Seconds, or a duration such as `30s`."""

_RETRIED = {
    "peermem.v1.NodeService": ["GetNode", "ListNodes", "ListDevices", "ListNics"],
    "peermem.v1.RegionService": [
        "CreateRegion",
        "GetRegion",
        "ListRegions",
        "FindRegions",
        "DeleteRegion",
        "RenewLease",
        "LoadRegion",
        "StoreRegion",
    ],
    "peermem.v1.TransferService": ["GetTransfer", "ListTransfers", "CancelTransfer"],
}

SERVICE_CONFIG: Mapping[str, Any] = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method} for service, methods in _RETRIED.items() for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 2,
                "initialBackoff": "0.1s",
                "maxBackoff": "0.1s",
                "backoffMultiplier": 1,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
"""What gRPC repeats by itself, once: calls that are idempotent, by nature or by request_id."""


def request_id() -> str:
    """Return a new request_id."""
    return secrets.token_hex(16)


def seconds(time: Time | None, field: str = "timeout") -> float | None:
    """Return `time` in seconds. Raises InvalidField."""
    if time is None:
        return None
    value = _parsed(parse_duration, time, field)
    if value < 0:
        raise InvalidField(f"{field} {time!r} is negative.", field=field)
    return value


def size(value: int | str, field: str) -> int:
    """Return `value` in bytes. Raises InvalidField."""
    return _parsed(parse_size, value, field)


def create_region(
    *,
    device: str = "",
    adopted: str = "",
    gpu: region_pb2.GpuMemory | None = None,
    length: int | str = 0,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    lease: str | float | None = None,
    publish: bool = False,
    request: str | None = None,
) -> region_pb2.CreateRegionRequest:
    """Return the request for a region on `device`, of the file descriptor behind the token `adopted`, or of memory on a
    GPU."""
    bytes_asked = size(length, "length")
    if bytes_asked < 0 or bytes_asked >= 1 << 64:
        raise InvalidField(f"length {bytes_asked} must be 0 to 2^64-1 bytes.", field="length")
    message = region_pb2.CreateRegionRequest(
        request_id=request or request_id(),
        region_id=name or "",
        length=bytes_asked,
        labels=labels or {},
        lease=_lease(lease),
        publish=publish,
    )
    if adopted:
        message.adopted = adopted
    elif gpu is not None:
        message.gpu.CopyFrom(gpu)
    else:
        message.device = device
    return message


def gpu_memory(found: GpuRange, devices: Iterable[Device]) -> region_pb2.GpuMemory:
    """Return what tells a daemon with these devices of a tensor. Raises DeviceNotFound."""
    for device in devices:
        if (device.kind, device.pci_address) == (found.kind, found.pci_address):
            return region_pb2.GpuMemory(device=device.name, handle=found.handle, offset=found.offset)
    raise DeviceNotFound(
        f"The tensor is on the GPU at {found.pci_address}, of which the daemon has no device of kind {found.kind}. Add "
        "a [[device]] table for it to the daemon's configuration.",
        pci_address=found.pci_address,
    )


def create_transfer(
    segments: Iterable[transfer_pb2.SegmentList],
    *,
    timeout: Time | None,
    checksum: bool,
    fabric: FabricKind | str | None,
    request: str | None,
) -> transfer_pb2.CreateTransferRequest:
    """Return the request for a transfer."""
    limit = seconds(timeout)
    return transfer_pb2.CreateTransferRequest(
        request_id=request or request_id(),
        segments=segments,
        timeout=None if limit is None else duration(limit),
        checksum=checksum,
        fabric=_fabric(fabric),
    )


def read_region(name: str, offset: int, length: int) -> region_pb2.ReadRegionRequest:
    """Return the request for a range of a region. Raises OutOfRange."""
    _check_range(name, offset, length)
    return region_pb2.ReadRegionRequest(name=name, offset=offset, length=length)


def write_region(name: str, offset: int, data: memoryview) -> Iterator[region_pb2.WriteRegionRequest]:
    """Return the messages of one WriteRegion call. Raises OutOfRange."""
    _check_range(name, offset, len(data))
    return _write_chunks(name, offset, data)


def duration(time: float) -> Duration:
    """Return `time` seconds as a message."""
    whole = int(time)
    return Duration(seconds=whole, nanos=int((time - whole) * 1e9))


def _write_chunks(name: str, offset: int, data: memoryview) -> Iterator[region_pb2.WriteRegionRequest]:
    yield region_pb2.WriteRegionRequest(name=name, offset=offset)
    for start in range(0, len(data), CHUNK):
        yield region_pb2.WriteRegionRequest(data=bytes(data[start : start + CHUNK]))


def _check_range(name: str, offset: int, length: int) -> None:
    """Refuse what the contract's unsigned numbers can't say; the daemon checks against the region."""
    if offset < 0 or length < 0 or offset + length >= 1 << 64:
        raise OutOfRange(
            f"{length} bytes from {offset} on are not inside {name}; count from 0.",
            region=name,
            offset=offset,
            length=length,
        )


def _lease(lease: str | float | None) -> region_pb2.Lease | None:
    """Return the lease for `session`, `none`, a time to live, or None for the daemon's default."""
    if lease is None:
        return None
    if lease == "session":
        return region_pb2.Lease(kind=region_pb2.LEASE_KIND_SESSION)
    if lease == "none":
        return region_pb2.Lease(kind=region_pb2.LEASE_KIND_NONE)
    return region_pb2.Lease(kind=region_pb2.LEASE_KIND_TTL, ttl=duration(seconds(lease, "lease") or 0.0))


def _fabric(fabric: FabricKind | str | None) -> transfer_pb2.Fabric.ValueType:
    if fabric is None:
        return transfer_pb2.FABRIC_UNSPECIFIED
    try:
        kind = FabricKind(fabric)
    except ValueError:
        choice = ", ".join(kind.value for kind in FabricKind)
        raise InvalidField(f"fabric {fabric!r} must be one of {choice}.", field="fabric") from None
    return transfer_pb2.Fabric.Value(f"FABRIC_{kind.name}")


def _parsed(parse: Callable[[T], R], value: T, field: str) -> R:
    try:
        return parse(value)
    except ValueError as error:
        raise InvalidField(f"{field}: {error}.", field=field) from None
