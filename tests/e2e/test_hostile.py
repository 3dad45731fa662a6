"""Bytes, messages and clients that mean no good, on every port, while an honest transfer goes on."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from bench.daemons import Daemon

import peermem
from peermem import errors
from peermem.v1 import node_pb2, node_pb2_grpc, region_pb2, transfer_pb2, transfer_pb2_grpc
from tests.e2e.support import MIB, eventually, fault, noise


@pytest.fixture(scope="module")
def transfers(channel: grpc.Channel) -> transfer_pb2_grpc.TransferServiceStub:
    return transfer_pb2_grpc.TransferServiceStub(channel)


Door = tuple[int, int, object]


def create(source: str, sink: str, length: int = 1, **fields: object) -> transfer_pb2.CreateTransferRequest:
    ranges = transfer_pb2.Ranges(source_offsets=[0], destination_offsets=[0], lengths=[length])
    entry = transfer_pb2.SegmentList(source=source, destination=sink, ranges=ranges)
    return transfer_pb2.CreateTransferRequest(segments=[entry], **fields)  # type: ignore[arg-type]


def garbage(generator: random.Random) -> bytes:
    starts = (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n", b"\0" * 64, b"PMEM", b"\x16\x03\x01")
    return generator.choice(starts) + generator.randbytes(generator.choice((0, 1, 48, 5000)))


def throw(family: int, kind: int, address: object, data: bytes) -> None:
    """Send bytes as far as they go, and see the connection's end or nothing at all."""
    with socket.socket(family, kind) as sock, suppress(OSError):
        sock.settimeout(0.2)
        sock.connect(address)  # type: ignore[arg-type]
        sock.sendall(data) if kind == socket.SOCK_STREAM else sock.send(data[:4000])
        sock.recv(4096)


def throw_all(part: list[tuple[Door, bytes]]) -> None:
    for (family, kind, address), data in part:
        throw(family, kind, address, data)


def test_garbage_on_every_port_does_not_hurt_an_honest_transfer(
    trio: dict[str, Daemon], a: peermem.Node, b: peermem.Node
) -> None:
    daemon = trio["a"]
    ports = [(host, int(port)) for host, _, port in (x.partition(":") for x in (daemon.grpc, daemon.tcp, daemon.http))]
    doors: list[Door] = [(socket.AF_INET, socket.SOCK_STREAM, port) for port in ports]
    doors.append((socket.AF_UNIX, socket.SOCK_STREAM, str(daemon.folder / "peermem.sock")))
    doors.append((socket.AF_UNIX, socket.SOCK_SEQPACKET, str(daemon.folder / "attach.sock")))
    generator = random.Random(5)
    thrown = [(door, garbage(generator)) for door in doors for _ in range(12)]
    throwing = [threading.Thread(target=throw_all, args=(part,)) for part in (thrown[index::4] for index in range(4))]
    with (
        a.create_region(device="bar0", length=64 * MIB) as x,
        b.create_region(device="bar0", length=64 * MIB) as y,
    ):
        x.map()[:] = noise(MIB) * 64
        for thread in throwing:
            thread.start()
        done = 0
        while any(thread.is_alive() for thread in throwing) or done == 0:
            assert a.transfer(x, y, checksum=True).wait("30s").state == "SUCCEEDED"
            done += 1
        assert bytes(y.map()) == bytes(x.map())
    assert 'peermem_fabric_connections_rejected_total{fabric="tcp"} 0.0' not in daemon.scrape().splitlines()


def test_a_page_after_a_transfer_that_nobody_knows(transfers: transfer_pb2_grpc.TransferServiceStub) -> None:
    with pytest.raises(grpc.RpcError, match="start anew"):
        transfers.ListTransfers(transfer_pb2.ListTransfersRequest(page_token="t-never"))


def test_an_oversized_message_is_refused(
    transfers: transfer_pb2_grpc.TransferServiceStub, regions: tuple[peermem.Region, peermem.Region]
) -> None:
    x, y = regions
    message = create(x.name, y.name)
    message.segments[0].ranges.source_offsets.extend([2**63] * (1 << 19))
    with pytest.raises(grpc.RpcError) as caught:
        transfers.CreateTransfer(message)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_bytes_that_are_no_message(channel: grpc.Channel) -> None:
    raw: Any = channel  # without message classes, bytes go as they are; the stubs of grpc don't know that
    calls: tuple[Callable[[bytes], object], ...] = (
        raw.unary_unary("/peermem.v1.TransferService/CreateTransfer"),
        raw.unary_unary("/peermem.v1.LinkService/OpenLink"),
        lambda data: list(raw.unary_stream("/peermem.v1.RegionService/ReadRegion")(data)),
        lambda data: raw.stream_unary("/peermem.v1.RegionService/WriteRegion")(iter([data])),
        lambda data: list(raw.stream_stream("/peermem.v1.TransferService/PipelineTransfers")(iter([data]))),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff" * 100)
        assert isinstance(fault(caught.value), errors.MalformedMessage)
    with pytest.raises(grpc.RpcError) as caught:
        raw.unary_unary("/peermem.v1.TransferService/Nothing")(b"")
    assert isinstance(fault(caught.value), errors.NotSupported)


@pytest.mark.parametrize(
    ("source", "sink", "wanted"),
    [
        ("nodes/a/regions/none", "nodes/a/regions/none-either", errors.RegionNotFound),
        ("nodes/nowhere/regions/x", "nodes/a/regions/y", errors.NodeNotFound),
        ("regions/x", "nodes/a/regions/y", errors.InvalidField),
        ("nodes/a/regions/x/../y", "nodes/a/regions/y", errors.InvalidField),
        ("", "", errors.InvalidField),
        ("nodes/a/regions/" + "x" * 5000, "nodes/a/regions/y", errors.InvalidField),
    ],
)
def test_names_that_lead_nowhere(
    transfers: transfer_pb2_grpc.TransferServiceStub, source: str, sink: str, wanted: type[errors.PeermemError]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        transfers.CreateTransfer(create(source, sink))
    error = fault(caught.value)
    assert type(error) is wanted
    assert len(error.message) < 600


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ({"ranges": transfer_pb2.Ranges()}, errors.ZeroLength),
        (
            {"ranges": transfer_pb2.Ranges(source_offsets=[0], destination_offsets=[0], lengths=[0])},
            errors.ZeroLength,
        ),
        (
            {"ranges": transfer_pb2.Ranges(source_offsets=[0], destination_offsets=[0, 1], lengths=[1])},
            errors.SegmentsMismatch,
        ),
        (
            {"ranges": transfer_pb2.Ranges(source_offsets=[2**64 - 1], destination_offsets=[0], lengths=[2])},
            errors.OutOfRange,
        ),
        (
            {"ranges": transfer_pb2.Ranges(source_offsets=[0], destination_offsets=[0], lengths=[2**64 - 1])},
            errors.OutOfRange,
        ),
        (
            {"ranges": transfer_pb2.Ranges(source_offsets=[0], destination_offsets=[MIB], lengths=[1])},
            errors.OutOfRange,
        ),
        ({"strided": transfer_pb2.Strided(length=1, count=2**63, source_stride=1, destination_stride=2)}, None),
        (
            {"strided": transfer_pb2.Strided(length=2**63, count=2, source_stride=0, destination_stride=2**63)},
            errors.OutOfRange,
        ),
        ({"strided": transfer_pb2.Strided(length=8, count=2, destination_stride=7)}, errors.SegmentsOverlap),
        ({"strided": transfer_pb2.Strided(length=0, count=1)}, errors.ZeroLength),
        ({}, errors.InvalidField),
    ],
)
def test_ranges_that_can_not_be(
    transfers: transfer_pb2_grpc.TransferServiceStub,
    regions: tuple[peermem.Region, peermem.Region],
    layout: dict[str, object],
    wanted: type[errors.PeermemError] | None,
) -> None:
    x, y = regions
    entry = transfer_pb2.SegmentList(source=x.name, destination=y.name, **layout)  # type: ignore[arg-type]
    request = transfer_pb2.CreateTransferRequest(segments=[entry])
    request.wait.seconds = 20
    try:
        answer = transfers.CreateTransfer(request)
        reason = answer.error.reason
    except grpc.RpcError as error:
        reason = fault(error).reason
    assert reason in ((wanted.reason,) if wanted else (errors.InvalidField.reason, errors.OutOfRange.reason))


@pytest.mark.parametrize(
    "field", [{"fabric": 77}, {"timeout": {"seconds": -1}}, {"timeout": {"seconds": 10**9}}, {"wait": {"seconds": -5}}]
)
def test_values_outside_their_enum_or_bounds(
    transfers: transfer_pb2_grpc.TransferServiceStub,
    regions: tuple[peermem.Region, peermem.Region],
    field: dict[str, object],
) -> None:
    x, y = regions
    with pytest.raises(grpc.RpcError) as caught:
        transfers.CreateTransfer(create(x.name, y.name, **field))  # type: ignore[arg-type]
    assert isinstance(fault(caught.value), errors.InvalidField)


def test_no_segments_and_pages_of_no_size(transfers: transfer_pb2_grpc.TransferServiceStub) -> None:
    for call in (
        lambda: transfers.CreateTransfer(transfer_pb2.CreateTransferRequest()),
        lambda: transfers.ListTransfers(transfer_pb2.ListTransfersRequest(page_size=-1)),
        lambda: transfers.ListTransfers(transfer_pb2.ListTransfersRequest(page_size=1001)),
        lambda: transfers.GetTransfer(transfer_pb2.GetTransferRequest(name="nodes/a/regions/x")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert isinstance(fault(caught.value), errors.InvalidField)
    with pytest.raises(grpc.RpcError) as caught:
        transfers.GetTransfer(transfer_pb2.GetTransferRequest(name="nodes/a/transfers/none"))
    assert isinstance(fault(caught.value), errors.TransferNotFound)
    with pytest.raises(grpc.RpcError) as caught:
        transfers.CancelTransfer(transfer_pb2.CancelTransferRequest(name="nodes/b/transfers/none"))
    assert isinstance(fault(caught.value), errors.WrongNode)


def test_a_watcher_that_stops_reading_hurts_nobody(
    transfers: transfer_pb2_grpc.TransferServiceStub, a: peermem.Node, b: peermem.Node
) -> None:
    with (
        a.create_region(device="bar0", length=128 * MIB) as x,
        b.create_region(device="bar0", length=128 * MIB) as y,
    ):
        transfer = a.transfer(x, y)
        eventually(lambda: bool(transfer.name), "the start")
        watches = [transfers.WatchTransfer(transfer_pb2.WatchTransferRequest(name=transfer.name)) for _ in range(20)]
        assert transfer.wait("30s").state == "SUCCEEDED"
        last = list(watches[0])[-1]
        assert (last.state, last.bytes_done) == (transfer_pb2.TRANSFER_STATE_SUCCEEDED, 128 * MIB)
        for watch in watches:
            watch.cancel()


def test_a_reader_that_stops_reading_does_not_keep_a_region(a: peermem.Node, channel: grpc.Channel) -> None:
    region = a.create_region(device="bar0", length=64 * MIB)
    read = channel.unary_stream(
        "/peermem.v1.RegionService/ReadRegion",
        request_serializer=region_pb2.ReadRegionRequest.SerializeToString,
        response_deserializer=region_pb2.ReadRegionResponse.FromString,
    )
    stream = read(region_pb2.ReadRegionRequest(name=region.name))
    next(stream)
    region.delete(force=True)
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            pass
    assert isinstance(fault(caught.value), errors.RegionDeleted)


def test_a_pipeline_that_stops_reading_hurts_nobody(
    transfers: transfer_pb2_grpc.TransferServiceStub, regions: tuple[peermem.Region, peermem.Region], a: peermem.Node
) -> None:
    x, y = regions
    release = threading.Event()

    def commands() -> Iterator[transfer_pb2.PipelineTransfersRequest]:
        for tag in range(3000):
            yield transfer_pb2.PipelineTransfersRequest(tag=tag, create=create(x.name, y.name))
        release.wait(30)

    call = transfers.PipelineTransfers(commands())
    assert next(call).transfer.name
    assert a.transfer(x, y, checksum=True).wait("30s").state == "SUCCEEDED"
    call.cancel()
    release.set()
    eventually(lambda: not list(a.transfers(running=True)), "the end of what the pipeline started")


@pytest.mark.parametrize("kind", ["same tag", "nothing"])
def test_a_pipeline_that_breaks_the_rules_is_ended(
    transfers: transfer_pb2_grpc.TransferServiceStub, a: peermem.Node, b: peermem.Node, kind: str
) -> None:
    with a.create_region(device="bar0", length=64 * MIB) as x, b.create_region(device="bar0", length=64 * MIB) as y:
        good = transfer_pb2.PipelineTransfersRequest(tag=1, create=create(x.name, y.name, 64 * MIB))
        bad = good if kind == "same tag" else transfer_pb2.PipelineTransfersRequest(tag=2)
        with pytest.raises(grpc.RpcError) as caught:
            list(transfers.PipelineTransfers(iter([good, bad])))
        assert isinstance(fault(caught.value), errors.InvalidField)
        eventually(lambda: not list(a.transfers(running=True)), "the end of what the pipeline started")


def test_a_cancel_that_follows_its_create_at_once_is_not_lost(
    transfers: transfer_pb2_grpc.TransferServiceStub, a: peermem.Node, b: peermem.Node
) -> None:
    count = 20_000
    with a.create_region(device="bar0", length=256 * MIB) as x, b.create_region(device="bar0", length=256 * MIB) as y:
        strided = transfer_pb2.Strided(length=4096, count=count, source_stride=8192, destination_stride=8192)
        entry = transfer_pb2.SegmentList(source=x.name, destination=y.name, strided=strided)
        big = transfer_pb2.CreateTransferRequest(request_id="cancelled", segments=[entry])
        commands = [
            transfer_pb2.PipelineTransfersRequest(tag=1, create=big),
            transfer_pb2.PipelineTransfersRequest(tag=1, cancel=transfer_pb2.PipelineCancel()),
            transfer_pb2.PipelineTransfersRequest(tag=9, cancel=transfer_pb2.PipelineCancel()),
        ]
        answers = list(transfers.PipelineTransfers(iter(commands)))
        assert answers[-1].transfer.state == transfer_pb2.TRANSFER_STATE_CANCELLED


def test_identities_that_are_made_up(channel: grpc.Channel) -> None:
    nodes = node_pb2_grpc.NodeServiceStub(channel)
    transfers = transfer_pb2_grpc.TransferServiceStub(channel)
    for claimed in ("uid:0", "@", "x" * 400, "uid:0@b@"):
        with pytest.raises(grpc.RpcError) as caught:
            transfers.CancelTransfer(
                transfer_pb2.CancelTransferRequest(name="nodes/a/transfers/x"),
                metadata=(("peermem-on-behalf-of", claimed),),
            )
        assert isinstance(fault(caught.value), errors.InvalidField)
    with pytest.raises(grpc.RpcError) as caught:
        nodes.GetNode(node_pb2.GetNodeRequest(name="nodes/nowhere"))
    assert isinstance(fault(caught.value), errors.NodeNotFound)
    with pytest.raises(grpc.RpcError) as caught:
        list(nodes.Preflight(node_pb2.PreflightRequest(devices=["nowhere"])))
    assert isinstance(fault(caught.value), errors.DeviceNotFound)
