from __future__ import annotations

from typing import Any

import pytest

from peermem.client import requests
from peermem.core.errors import InvalidField, OutOfRange
from peermem.core.types import FabricKind
from peermem.v1 import region_pb2, transfer_pb2


def transfer(**options: Any) -> transfer_pb2.CreateTransferRequest:
    return requests.create_transfer(
        [], **({"timeout": None, "checksum": False, "fabric": None, "request": None} | options)
    )


def test_every_mutation_has_a_request_id_of_its_own() -> None:
    ids = {requests.create_region(device="x", length=1).request_id for _ in range(3)} | {transfer().request_id}
    assert len(ids) == 4
    assert transfer(request="mine").request_id == "mine"


@pytest.mark.parametrize(("length", "expected"), [(5, 5), ("64MiB", 64 << 20), ("1.5KiB", 1536)])
def test_lengths_are_numbers_or_sizes(length: int | str, expected: int) -> None:
    assert requests.create_region(device="x", length=length).length == expected


@pytest.mark.parametrize("length", ["64MB", "x", -1, 1 << 64])
def test_wrong_lengths_are_refused(length: int | str) -> None:
    with pytest.raises(InvalidField) as caught:
        requests.create_region(device="x", length=length)
    assert caught.value.metadata["field"] == "length"


def test_leases() -> None:
    def lease(value: Any) -> tuple[int, float]:
        message = requests.create_region(device="x", length=1, lease=value).lease
        return message.kind, message.ttl.seconds + message.ttl.nanos / 1e9

    assert not requests.create_region(device="x", length=1).HasField("lease")
    assert lease("session") == (region_pb2.LEASE_KIND_SESSION, 0)
    assert lease("none") == (region_pb2.LEASE_KIND_NONE, 0)
    assert lease("30s") == (region_pb2.LEASE_KIND_TTL, 30)
    assert lease(1.5) == (region_pb2.LEASE_KIND_TTL, 1.5)
    with pytest.raises(InvalidField, match="lease"):
        lease("soon")


def test_a_region_comes_from_a_device_or_a_file() -> None:
    assert requests.create_region(device="bar0", length=1).WhichOneof("source") == "device"
    assert requests.create_region(adopted="token").WhichOneof("source") == "adopted"


@pytest.mark.parametrize(
    ("fabric", "expected"),
    [
        (None, transfer_pb2.FABRIC_UNSPECIFIED),
        ("tcp", transfer_pb2.FABRIC_TCP),
        (FabricKind.LOCAL, transfer_pb2.FABRIC_LOCAL),
    ],
)
def test_fabrics(fabric: FabricKind | str | None, expected: int) -> None:
    assert transfer(fabric=fabric).fabric == expected


def test_an_unknown_fabric_is_refused() -> None:
    with pytest.raises(InvalidField, match="verbs, tcp, local"):
        transfer(fabric="ether")


def test_timeouts() -> None:
    assert not transfer().HasField("timeout")
    assert transfer(timeout="1.5s").timeout.ToMilliseconds() == 1500
    for wrong in (-1, "-1s", "soon"):
        with pytest.raises(InvalidField, match="timeout"):
            transfer(timeout=wrong)


def test_a_write_is_cut_into_chunks() -> None:
    data = bytes(range(256)) * 8192 + b"end"
    first, *rest = requests.write_region("nodes/a/regions/x", 7, memoryview(data))
    assert (first.name, first.offset, first.data) == ("nodes/a/regions/x", 7, b"")
    assert b"".join(chunk.data for chunk in rest) == data
    assert max(len(chunk.data) for chunk in rest) == 1 << 20
    assert {chunk.name for chunk in rest} == {""}


def test_only_idempotent_calls_are_repeated() -> None:
    (config,) = requests.SERVICE_CONFIG["methodConfig"]
    methods = {name["method"] for name in config["name"]}
    assert methods.isdisjoint({"PipelineTransfers", "CreateTransfer", "WriteRegion", "ReadRegion", "Preflight"})
    assert config["retryPolicy"]["maxAttempts"] == 2


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, -5), (1 << 64, 1), ((1 << 64) - 1, 1)])
def test_ranges_that_the_contract_cannot_say_are_refused(offset: int, length: int) -> None:
    with pytest.raises(OutOfRange):
        requests.read_region("nodes/a/regions/x", offset, length)
