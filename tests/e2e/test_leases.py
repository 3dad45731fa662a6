"""What keeps regions alive, and requests that are repeated."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

import grpc
import pytest
from bench.daemons import Daemon
from google.protobuf.duration_pb2 import Duration

import peermem
from peermem import errors
from peermem.client.attach import Attachment
from peermem.v1 import region_pb2, region_pb2_grpc, transfer_pb2, transfer_pb2_grpc
from tests.e2e.support import eventually, fault, metric


@pytest.fixture(scope="module")
def stub(trio: dict[str, Daemon]) -> Iterator[region_pb2_grpc.RegionServiceStub]:
    """Calls without a session, as from another host."""
    with grpc.insecure_channel(trio["a"].grpc) as channel:
        yield region_pb2_grpc.RegionServiceStub(channel)


def reason(error: grpc.RpcError) -> str:
    return fault(error).reason


def request(
    region_id: str = "", request_id: str = "", lease: region_pb2.Lease | None = None
) -> region_pb2.CreateRegionRequest:
    message = region_pb2.CreateRegionRequest(
        request_id=request_id, region_id=region_id, device="bar0", length=4096, lease=lease
    )
    return message


def delete(stub: region_pb2_grpc.RegionServiceStub, name: str, request_id: str = "") -> None:
    stub.DeleteRegion(region_pb2.DeleteRegionRequest(name=name, request_id=request_id), timeout=10)


def ttl(seconds: int) -> region_pb2.Lease:
    return region_pb2.Lease(kind=region_pb2.LEASE_KIND_TTL, ttl=Duration(seconds=seconds))


def test_a_lease_that_nobody_renews_ends_the_region(
    trio: dict[str, Daemon], a: peermem.Node, stub: region_pb2_grpc.RegionServiceStub
) -> None:
    before = metric(trio["a"], "peermem_lease_expirations_total")
    region = stub.CreateRegion(request(lease=ttl(1)))
    kept = stub.CreateRegion(request(lease=ttl(3600)))
    assert region.lease.expire_time.seconds > region.create_time.seconds
    eventually(lambda: region.name not in {known.name for known in a.regions()}, "the lease's end")
    assert metric(trio["a"], "peermem_lease_expirations_total") == before + 1
    with pytest.raises(grpc.RpcError) as caught:
        stub.RenewLease(region_pb2.RenewLeaseRequest(names=[kept.name, region.name]))
    assert reason(caught.value) == errors.RegionNotFound.reason
    after = stub.RenewLease(region_pb2.RenewLeaseRequest(names=[kept.name])).leases[0]
    assert after.expire_time.ToNanoseconds() > kept.lease.expire_time.ToNanoseconds()
    delete(stub, kept.name)


def test_only_leases_with_a_time_are_renewed(a: peermem.Node, stub: region_pb2_grpc.RegionServiceStub) -> None:
    with (
        a.create_region(device="bar0", length=1) as session,
        a.create_region(device="bar0", length=1, lease="none") as forever,
    ):
        for region in (session, forever):
            with pytest.raises(errors.LeaseNotRenewable):
                a.renew_leases([region.name])
        with pytest.raises(grpc.RpcError) as caught:
            stub.RenewLease(region_pb2.RenewLeaseRequest(names=[forever.name]))
        assert reason(caught.value) == errors.AccessDenied.reason, "it belongs to a local user"
        with pytest.raises(grpc.RpcError) as caught:
            delete(stub, forever.name)
        assert reason(caught.value) == errors.AccessDenied.reason


@pytest.mark.parametrize("lease", [ttl(0), ttl(8 * 86400), region_pb2.Lease(kind=9), region_pb2.Lease(kind=3)])  # type: ignore[arg-type]
def test_a_lease_outside_its_bounds_is_refused(
    stub: region_pb2_grpc.RegionServiceStub, lease: region_pb2.Lease
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateRegion(request(lease=lease))
    assert reason(caught.value) == errors.InvalidField.reason


def test_a_session_lease_needs_a_session(stub: region_pb2_grpc.RegionServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateRegion(request(lease=region_pb2.Lease(kind=region_pb2.LEASE_KIND_SESSION)))
    assert reason(caught.value) == errors.SessionNotFound.reason


def test_a_token_of_no_session_counts_nowhere(stub: region_pb2_grpc.RegionServiceStub, trio: dict[str, Daemon]) -> None:
    """The token of a session that ended is one of no session, too."""
    attachment = Attachment.open(str(trio["a"].folder / "attach.sock"))
    ended = attachment.token
    attachment.close()
    with grpc.insecure_channel(trio["a"].target) as channel:
        local = region_pb2_grpc.RegionServiceStub(channel)
        for token in ("of-nobody", ended):
            eventually(partial(refused, local, token), "the end of the session")
            with pytest.raises(grpc.RpcError) as caught:
                stub.CreateRegion(request(), metadata=(("peermem-session", token),))
            assert reason(caught.value) == errors.Unauthenticated.reason, "on TCP no session counts"


def test_a_pipeline_does_not_outlive_its_session(trio: dict[str, Daemon], a: peermem.Node) -> None:
    attachment = Attachment.open(str(trio["a"].folder / "attach.sock"))
    commands: SimpleQueue[transfer_pb2.PipelineTransfersRequest | None] = SimpleQueue()
    with (
        a.create_region(device="bar0", length=1) as x,
        a.create_region(device="bar0", length=1) as y,
        grpc.insecure_channel(trio["a"].target) as channel,
    ):
        ranges = transfer_pb2.Ranges(source_offsets=[0], destination_offsets=[0], lengths=[1])
        entry = transfer_pb2.SegmentList(source=x.name, destination=y.name, ranges=ranges)
        create = transfer_pb2.CreateTransferRequest(segments=[entry])
        stub = transfer_pb2_grpc.TransferServiceStub(channel)
        answers = stub.PipelineTransfers(
            iter(commands.get, None), metadata=(("peermem-session", attachment.token),), timeout=30
        )
        commands.put(transfer_pb2.PipelineTransfersRequest(tag=1, create=create))
        assert next(answers).transfer.name
        attachment.close()
        eventually(partial(refused, region_pb2_grpc.RegionServiceStub(channel), attachment.token), "the session's end")
        commands.put(transfer_pb2.PipelineTransfersRequest(tag=2, create=create))
        commands.put(None)
        late = [answer for answer in answers if answer.tag == 2]
        assert [answer.error.reason for answer in late] == [errors.SessionNotFound.reason]


def refused(stub: region_pb2_grpc.RegionServiceStub, token: str) -> bool:
    """Whether a call is refused because its session is unknown, and not because it asks for what there is not."""
    wanted = region_pb2.RenewLeaseRequest(names=["nodes/a/regions/none"])
    with pytest.raises(grpc.RpcError) as caught:
        stub.RenewLease(wanted, metadata=(("peermem-session", token),))
    return reason(caught.value) == errors.SessionNotFound.reason


def test_a_repeated_request_makes_one_region(a: peermem.Node, stub: region_pb2_grpc.RegionServiceStub) -> None:
    same = request("idempotent", "create-1")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: stub.CreateRegion(same), range(8)))
    assert all(region == made[0] for region in made)
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateRegion(request("other", "create-1"))
    assert reason(caught.value) == errors.RequestIdReused.reason
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateRegion(request("idempotent", "create-2"))
    assert reason(caught.value) == errors.RegionExists.reason
    for _ in range(2):
        delete(stub, made[0].name, "delete-1")
    assert stub.CreateRegion(same) == made[0], "the first result, although the region is gone"
    with pytest.raises(grpc.RpcError) as caught:
        delete(stub, made[0].name)
    assert reason(caught.value) == errors.RegionNotFound.reason
    with pytest.raises(grpc.RpcError) as caught:
        delete(stub, "nodes/a/regions/other", "delete-1")
    assert reason(caught.value) == errors.RequestIdReused.reason


def test_a_request_whose_reply_was_lost_is_repeated(a: peermem.Node, stub: region_pb2_grpc.RegionServiceStub) -> None:
    big = region_pb2.CreateRegionRequest(request_id="lost", region_id="lost", device="bar0", length=256 << 20)
    call = stub.CreateRegion.future(big)
    eventually(lambda: next(device for device in a.devices() if device.name == "bar0").available < 1 << 30, "the start")
    call.cancel()
    assert stub.CreateRegion(big).name == "nodes/a/regions/lost"
    delete(stub, "nodes/a/regions/lost")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (region_pb2.CreateRegionRequest(device="bar0"), errors.ZeroLength),
        (region_pb2.CreateRegionRequest(length=1), errors.InvalidField),
        (region_pb2.CreateRegionRequest(device="none", length=1), errors.DeviceNotFound),
        (region_pb2.CreateRegionRequest(device="adopted", length=1), errors.NotSupported),
        (region_pb2.CreateRegionRequest(adopted="x", length=1), errors.SessionNotFound),
        (region_pb2.CreateRegionRequest(device="bar0", length=2**64 - 1), errors.DeviceFull),
        (region_pb2.CreateRegionRequest(device="bar0", length=1, region_id="Not/Good"), errors.InvalidField),
        (region_pb2.CreateRegionRequest(device="bar0", length=1, request_id="x" * 129), errors.InvalidField),
        (region_pb2.CreateRegionRequest(device="bar0", length=1, labels={"x" * 64: ""}), errors.InvalidField),
    ],
)
def test_a_region_that_can_not_be_made(
    stub: region_pb2_grpc.RegionServiceStub,
    message: region_pb2.CreateRegionRequest,
    wanted: type[peermem.PeermemError],
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateRegion(message)
    assert reason(caught.value) == wanted.reason
