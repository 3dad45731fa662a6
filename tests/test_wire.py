import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.errors import InvalidField, OutOfRange, PeermemError, RegionNotFound, SegmentsMismatch, ZeroLength
from peermem.core.names import ChildName
from peermem.core.plan import Direction
from peermem.core.region import Lease
from peermem.core.transfer import State, TransferFacts
from peermem.core.types import FabricKind, LeaseKind, Path
from peermem.v1 import error_pb2, region_pb2, transfer_pb2
from peermem.wire import (
    duration_from_proto,
    error_from_proto,
    error_to_proto,
    fabric_from_proto,
    labels_from_proto,
    lease_from_proto,
    lease_to_proto,
    transfer_from_proto,
    transfer_request_from_proto,
    transfer_request_to_proto,
    transfer_to_proto,
)

LIMIT = 1000


def test_the_contract_lists_exactly_the_reasons_of_the_core() -> None:
    named = {name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert named - {"UNSPECIFIED"} == set(PeermemError.by_reason)


def test_a_fault_crosses_the_wire() -> None:
    back = error_from_proto(error_to_proto(RegionNotFound("It is not here.", region="x")))
    assert (type(back), back.message, back.metadata) == (RegionNotFound, "It is not here.", {"region": "x"})


@pytest.mark.parametrize("fabric", [None, *FabricKind])
def test_a_transfer_crosses_the_wire(fabric: FabricKind | None) -> None:
    facts = TransferFacts(
        name=ChildName("a", "transfers", "t"),
        state=State.FAILED,
        bytes_total=10,
        bytes_done=4,
        segment_count=2,
        fabric=fabric,
        direction=Direction.PUSH,
        owner="uid:0",
        error=OutOfRange("Too far.", reach=9),
        created_at=1234.5,
        duration=0.25,
        crc32c=7,
        path=Path.HOST,
        executed_by="nodes/b/transfers/u",
        fabric_why="Both nodes have a NIC that works.",
    )
    back = transfer_from_proto(transfer_to_proto(facts))
    assert back.error is not None
    assert (back.error.reason, back.error.metadata) == ("OUT_OF_RANGE", {"reach": "9"})
    assert [getattr(back, name) for name in TransferFacts.__slots__ if name != "error"] == [
        getattr(facts, name) for name in TransferFacts.__slots__ if name != "error"
    ]


def ranges(sources: list[int], targets: list[int], lengths: list[int]) -> transfer_pb2.SegmentList:
    return transfer_pb2.SegmentList(
        source="nodes/a/regions/x",
        destination="nodes/b/regions/y",
        ranges=transfer_pb2.Ranges(source_offsets=sources, destination_offsets=targets, lengths=lengths),
    )


def test_a_request_crosses_the_wire() -> None:
    message = transfer_pb2.CreateTransferRequest(
        segments=[ranges([0, 8], [100, 0], [4])],
        timeout=Duration(seconds=3),
        checksum=True,
        fabric=transfer_pb2.FABRIC_TCP,
    )
    request = transfer_request_from_proto(message, LIMIT)
    assert (request.timeout, request.checksum, request.fabric) == (3.0, True, FabricKind.TCP)
    assert (request.total, request.segment_count) == (8, 2)
    again = transfer_request_from_proto(transfer_request_to_proto(request, "id"), LIMIT)
    assert list(again.lists[0].lengths) == [4, 4]
    assert again.timeout == 3.0


@pytest.mark.parametrize(
    ("message", "kind", "says"),
    [
        (transfer_pb2.CreateTransferRequest(), InvalidField, "1 to 1024 lists, not 0"),
        (transfer_pb2.CreateTransferRequest(segments=[transfer_pb2.SegmentList()]), InvalidField, "segments.source"),
        (
            transfer_pb2.CreateTransferRequest(
                segments=[transfer_pb2.SegmentList(source="nodes/a/regions/x", destination="nodes/b/regions/y")]
            ),
            InvalidField,
            "neither ranges nor strided",
        ),
        (transfer_pb2.CreateTransferRequest(segments=[ranges([0], [0, 1], [1])]), SegmentsMismatch, "as many"),
        (transfer_pb2.CreateTransferRequest(segments=[ranges([0], [0], [0])]), ZeroLength, "no bytes"),
        (
            transfer_pb2.CreateTransferRequest(segments=[ranges(list(range(LIMIT + 1)), [], [])]),
            InvalidField,
            "above the 1000",
        ),
        (
            transfer_pb2.CreateTransferRequest(segments=[ranges(list(range(600)), list(range(600)), [1])] * 2),
            InvalidField,
            "above the 400",
        ),
        (
            transfer_pb2.CreateTransferRequest(segments=[ranges([0], [0], [1])], timeout=Duration(seconds=-1)),
            InvalidField,
            "timeout",
        ),
        (
            transfer_pb2.CreateTransferRequest(segments=[ranges([0], [0], [1])], fabric=99),  # type: ignore[arg-type]
            InvalidField,
            "fabric has the value 99",
        ),
    ],
)
def test_bad_requests_are_refused(
    message: transfer_pb2.CreateTransferRequest, kind: type[PeermemError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        transfer_request_from_proto(message, LIMIT)


def test_strided_lists_are_read() -> None:
    stride = transfer_pb2.Strided(source_stride=16, destination_stride=8, length=8, count=3)
    entry = transfer_pb2.SegmentList(source="nodes/a/regions/x", destination="nodes/b/regions/y", strided=stride)
    request = transfer_request_from_proto(transfer_pb2.CreateTransferRequest(segments=[entry]), LIMIT)
    assert list(request.lists[0].source_offsets) == [0, 16, 32]


def assert_sentence(error: PeermemError) -> None:
    assert error.message.endswith(".")


@given(st.binary(max_size=300))
def test_whatever_bytes_come_a_request_is_read_or_refused(data: bytes) -> None:
    message = transfer_pb2.CreateTransferRequest()
    try:
        message.ParseFromString(data)
    except Exception:
        return  # protobuf refused them before they reach us
    try:
        transfer_request_from_proto(message, LIMIT)
    except PeermemError as error:
        assert_sentence(error)


def test_leases() -> None:
    ttl = region_pb2.Lease(kind=region_pb2.LEASE_KIND_TTL, ttl=Duration(seconds=30))
    assert lease_from_proto(ttl) == Lease(LeaseKind.TTL, 30.0)
    assert lease_from_proto(region_pb2.Lease()) is None
    assert lease_from_proto(region_pb2.Lease(kind=region_pb2.LEASE_KIND_SESSION)) == Lease(LeaseKind.SESSION)
    assert lease_to_proto(Lease(LeaseKind.TTL, 30.0), 1000.0).expire_time.seconds == 1000
    with pytest.raises(InvalidField, match=r"lease.ttl of 0.5 s must be 1 s to 604800 s"):
        lease_from_proto(region_pb2.Lease(kind=region_pb2.LEASE_KIND_TTL, ttl=Duration(nanos=500_000_000)))
    with pytest.raises(InvalidField, match=r"lease.kind"):
        lease_from_proto(region_pb2.Lease(kind=77))  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [{"": "x"}, {"k" * 64: ""}, {"k": "v" * 64}, {f"k{i}": "" for i in range(17)}])
def test_labels_are_bounded(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidField):
        labels_from_proto(list(labels.items()))


def test_small_things() -> None:
    assert labels_from_proto([("k", "v")]) == {"k": "v"}
    assert fabric_from_proto(transfer_pb2.FABRIC_UNSPECIFIED) is None
    with pytest.raises(InvalidField, match=r"wait of 2 s"):
        duration_from_proto(Duration(seconds=2), "wait", 0, 1)


def test_what_is_left_of_the_limit_goes_from_list_to_list() -> None:
    stride = transfer_pb2.Strided(source_stride=16, destination_stride=16, length=8, count=600)
    entry = transfer_pb2.SegmentList(source="nodes/a/regions/x", destination="nodes/b/regions/y", strided=stride)
    with pytest.raises(InvalidField, match="above the 400"):
        transfer_request_from_proto(transfer_pb2.CreateTransferRequest(segments=[entry] * 2), LIMIT)
    with pytest.raises(InvalidField, match="1 to 1024 lists, not 1025"):
        transfer_request_from_proto(transfer_pb2.CreateTransferRequest(segments=[ranges([0], [0], [1])] * 1025), LIMIT)


@pytest.mark.parametrize(
    "entry",
    [
        ranges([0, 1 << 63], [0, 1 << 63], [1 << 63]),
        ranges([0], [1 << 63], [1]),
        transfer_pb2.SegmentList(
            source="nodes/a/regions/x",
            destination="nodes/b/regions/y",
            strided=transfer_pb2.Strided(source_stride=1 << 63, destination_stride=1 << 63, length=1 << 63, count=2),
        ),
    ],
)
def test_bytes_that_no_memory_has_are_refused(entry: transfer_pb2.SegmentList) -> None:
    with pytest.raises(OutOfRange, match="no region has"):
        transfer_request_from_proto(transfer_pb2.CreateTransferRequest(segments=[entry]), LIMIT)


def test_nor_may_the_lists_together_have_them() -> None:
    message = transfer_pb2.CreateTransferRequest(segments=[ranges([0], [0], [1 << 62])] * 2)
    with pytest.raises(OutOfRange):
        transfer_request_from_proto(message, LIMIT)
