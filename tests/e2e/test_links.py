"""LinkService, as a daemon that makes mistakes, or an impostor, would call it."""

from __future__ import annotations

import grpc
import pytest

import peermem
from peermem import errors
from peermem.v1 import link_pb2, link_pb2_grpc, transfer_pb2
from tests.e2e.support import eventually, fault


@pytest.fixture(scope="module")
def links(channel: grpc.Channel) -> link_pb2_grpc.LinkServiceStub:
    return link_pb2_grpc.LinkServiceStub(channel)


def grant(opened: link_pb2.OpenLinkResponse, name: str, **changes: object) -> link_pb2.AcquireGrantRequest:
    fields = {"link_id": opened.link_id, "epoch": opened.epoch, "region": name, "right": link_pb2.RIGHT_READ}
    fields |= {"subject": "anonymous@b", "offset": 10, "length": 20}
    return link_pb2.AcquireGrantRequest(**{**fields, **changes})  # type: ignore[arg-type]


def test_link_calls_with_wrong_ids_epochs_and_rights(
    links: link_pb2_grpc.LinkServiceStub, a: peermem.Node, regions: tuple[peermem.Region, peermem.Region]
) -> None:
    x, y = regions
    opened = links.OpenLink(link_pb2.OpenLinkRequest(node="nodes/b", fabric=transfer_pb2.FABRIC_TCP, rails=1))
    for change, wanted in (
        ({"link_id": b"x" * 16}, errors.LinkNotFound),
        ({"link_id": b""}, errors.LinkNotFound),
        ({"epoch": "another"}, errors.StaleEpoch),
        ({"right": 0}, errors.InvalidField),
        ({"right": 9}, errors.InvalidField),
        ({"region": y.name}, errors.RegionNotFound),
        ({"region": "x"}, errors.InvalidField),
        ({"subject": "uid:0"}, errors.InvalidField),
        ({"subject": ""}, errors.InvalidField),
        ({"length": 0}, errors.InvalidField),
        ({"offset": x.length, "length": 1}, errors.OutOfRange),
        ({"offset": 0, "length": x.length + 1}, errors.OutOfRange),
        ({"offset": 2**64 - 1, "length": 2**64 - 1}, errors.OutOfRange),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            links.AcquireGrant(grant(opened, x.name, **change))
        assert type(fault(caught.value)) is wanted
    granted = links.AcquireGrant(grant(opened, x.name))
    other = links.OpenLink(link_pb2.OpenLinkRequest(node="nodes/b", fabric=transfer_pb2.FABRIC_TCP, rails=1))
    links.ReleaseGrants(link_pb2.ReleaseGrantsRequest(link_id=other.link_id, grant_ids=[granted.grant_id]))
    checksum = link_pb2.ChecksumRequest(link_id=opened.link_id, grant_id=granted.grant_id, offsets=[0], lengths=[1])
    assert links.Checksum(checksum).crc32c, "another link can't release it"
    for wrong, why in (
        (link_pb2.ChecksumRequest(link_id=other.link_id, grant_id=granted.grant_id), errors.GrantRefused),
        (link_pb2.ChecksumRequest(link_id=opened.link_id, grant_id=1), errors.GrantRefused),
        (
            link_pb2.ChecksumRequest(
                link_id=opened.link_id, grant_id=granted.grant_id, offsets=[2**64 - 1], lengths=[2]
            ),
            errors.OutOfRange,
        ),
        (
            link_pb2.ChecksumRequest(link_id=opened.link_id, grant_id=granted.grant_id, offsets=[0], lengths=[21]),
            errors.OutOfRange,
        ),
        (
            link_pb2.ChecksumRequest(link_id=opened.link_id, grant_id=granted.grant_id, offsets=[0], lengths=[]),
            errors.SegmentsMismatch,
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            links.Checksum(wrong)
        assert type(fault(caught.value)) is why
    links.Flush(link_pb2.FlushRequest(link_id=opened.link_id, grant_id=granted.grant_id))
    with pytest.raises(grpc.RpcError) as caught:
        links.Flush(link_pb2.FlushRequest(link_id=other.link_id, grant_id=granted.grant_id))
    assert type(fault(caught.value)) is errors.GrantRefused
    for link in (opened, other, opened):
        links.CloseLink(link_pb2.CloseLinkRequest(link_id=link.link_id))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"node": "nodes/b", "rails": 1}, errors.FabricUnavailable),
        ({"node": "nodes/b", "fabric": transfer_pb2.FABRIC_VERBS, "rails": 1}, errors.FabricUnavailable),
        ({"node": "nodes/b", "fabric": transfer_pb2.FABRIC_LOCAL, "rails": 1}, errors.FabricUnavailable),
        ({"node": "nodes/b", "fabric": 50, "rails": 1}, errors.InvalidField),
        ({"node": "nodes/b", "fabric": transfer_pb2.FABRIC_TCP, "rails": 0}, errors.InvalidField),
        ({"node": "nodes/b", "fabric": transfer_pb2.FABRIC_TCP, "rails": 17}, errors.InvalidField),
        ({"node": "", "fabric": transfer_pb2.FABRIC_TCP, "rails": 1}, errors.InvalidField),
    ],
)
def test_links_that_can_not_be(
    links: link_pb2_grpc.LinkServiceStub, fields: dict[str, object], wanted: type[errors.PeermemError]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        links.OpenLink(link_pb2.OpenLinkRequest(**fields))  # type: ignore[arg-type]
    assert type(fault(caught.value)) is wanted


def test_links_that_nobody_connects_to_are_given_up(links: link_pb2_grpc.LinkServiceStub, a: peermem.Node) -> None:
    before = a.info().link_count
    for _ in range(20):
        links.OpenLink(link_pb2.OpenLinkRequest(node="nodes/b", fabric=transfer_pb2.FABRIC_TCP, rails=2))
    assert a.info().link_count >= before + 20
    eventually(lambda: a.info().link_count <= before, "the end of the links")


def test_a_release_of_too_many_grants(links: link_pb2_grpc.LinkServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        links.ReleaseGrants(link_pb2.ReleaseGrantsRequest(grant_ids=range(1001)))
    assert isinstance(fault(caught.value), errors.InvalidField)
