"""LinkService, as a daemon that makes mistakes, or an impostor, would call it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import SimpleQueue

import grpc
import pytest

import peermem
from peermem import errors
from peermem.v1 import link_pb2, link_pb2_grpc, transfer_pb2
from peermem.wire import error_from_proto
from tests.e2e.support import eventually, fault


@pytest.fixture(scope="module")
def links(channel: grpc.Channel) -> link_pb2_grpc.LinkServiceStub:
    return link_pb2_grpc.LinkServiceStub(channel)


def grant(opened: link_pb2.OpenLinkResponse, name: str, **changes: object) -> link_pb2.GrantQuestion:
    fields = {"link_id": opened.link_id, "epoch": opened.epoch, "region": name, "right": link_pb2.RIGHT_READ}
    fields |= {"subject": "anonymous@b", "offset": 10, "length": 20}
    return link_pb2.GrantQuestion(acquire=link_pb2.AcquireGrant(**{**fields, **changes}))  # type: ignore[arg-type]


def release(link_id: bytes, grant_ids: Iterable[int]) -> link_pb2.GrantQuestion:
    return link_pb2.GrantQuestion(release=link_pb2.ReleaseGrants(link_id=link_id, grant_ids=grant_ids))


class Exchange:
    """An ExchangeGrants call, one question at a time."""

    def __init__(self, links: link_pb2_grpc.LinkServiceStub) -> None:
        self._messages: SimpleQueue[link_pb2.ExchangeGrantsRequest | None] = SimpleQueue()
        self.answers = links.ExchangeGrants(iter(self._messages.get, None), timeout=30)
        self._last = 0

    def send(self, *questions: link_pb2.GrantQuestion) -> None:
        self._messages.put(link_pb2.ExchangeGrantsRequest(questions=questions))

    def ask(self, question: link_pb2.GrantQuestion) -> link_pb2.GrantAnswer:
        self._last += 1
        question.number = self._last
        self.send(question)
        (answer,) = next(self.answers).answers
        assert answer.number == self._last
        return answer

    def close(self) -> None:
        self._messages.put(None)
        assert next(self.answers, None) is None


@pytest.fixture
def exchange(links: link_pb2_grpc.LinkServiceStub) -> Iterator[Exchange]:
    exchange = Exchange(links)
    yield exchange
    exchange.close()


def test_link_calls_with_wrong_ids_epochs_and_rights(
    links: link_pb2_grpc.LinkServiceStub,
    exchange: Exchange,
    a: peermem.Node,
    regions: tuple[peermem.Region, peermem.Region],
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
        assert type(error_from_proto(exchange.ask(grant(opened, x.name, **change)).error)) is wanted
    granted = exchange.ask(grant(opened, x.name)).grant
    other = links.OpenLink(link_pb2.OpenLinkRequest(node="nodes/b", fabric=transfer_pb2.FABRIC_TCP, rails=1))
    assert not exchange.ask(release(other.link_id, [granted.grant_id])).HasField("outcome")
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


def test_questions_that_are_none(exchange: Exchange) -> None:
    for question in (release(b"", range(1001)), link_pb2.GrantQuestion()):
        assert isinstance(error_from_proto(exchange.ask(question).error), errors.InvalidField)


def test_a_message_of_too_many_questions_ends_the_exchange(links: link_pb2_grpc.LinkServiceStub) -> None:
    exchange = Exchange(links)
    exchange.send(*[link_pb2.GrantQuestion(number=1)] * 1025)
    with pytest.raises(grpc.RpcError) as caught:
        next(exchange.answers)
    assert isinstance(fault(caught.value), errors.InvalidField)


def test_many_questions_of_one_message_are_all_answered_but_those_without_a_number(
    exchange: Exchange, links: link_pb2_grpc.LinkServiceStub, a: peermem.Node, regions: tuple[peermem.Region, ...]
) -> None:
    opened = links.OpenLink(link_pb2.OpenLinkRequest(node="nodes/b", fabric=transfer_pb2.FABRIC_TCP, rails=1))
    before = a.info().grant_count
    questions = [grant(opened, regions[0].name) for _ in range(300)]
    for number, question in enumerate(questions):
        question.number = number  # the first one has none, and gets nothing
    exchange.send(*questions)
    answers: list[link_pb2.GrantAnswer] = []
    while len(answers) < 299:
        answers += next(exchange.answers).answers
    assert sorted(answer.number for answer in answers) == list(range(1, 300))
    assert a.info().grant_count == before + 299
    exchange.send(release(opened.link_id, [answer.grant.grant_id for answer in answers]))
    eventually(lambda: a.info().grant_count == before, "the end of the grants")
    links.CloseLink(link_pb2.CloseLinkRequest(link_id=opened.link_id))
