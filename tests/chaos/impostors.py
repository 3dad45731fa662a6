"""What is tried with a node's certificate, or with none, on what is for daemons only: links, grants and their keys.

Rules of this file: as in `strangers.py`.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc

from peermem import errors
from peermem.client.errors import from_proto
from peermem.fabric import frames, tcp_proof
from peermem.fabric.base import Opcode, Status
from peermem.v1 import link_pb2, link_pb2_grpc, transfer_pb2
from tests.chaos.strangers import TIMEOUT, Attempt, Caller, Reach


@dataclass(frozen=True, slots=True)
class Bait:
    """A region that nobody uses, and whose it is at its node."""

    region: str
    owner: str


class Links:
    """LinkService, as whoever a channel shows."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub: Any = link_pb2_grpc.LinkServiceStub(channel)

    def open(self, node: str) -> link_pb2.OpenLinkResponse:
        request = link_pb2.OpenLinkRequest(node=f"nodes/{node}", fabric=transfer_pb2.FABRIC_TCP, rails=1)
        opened: link_pb2.OpenLinkResponse = self._stub.OpenLink(request, timeout=TIMEOUT)
        return opened

    @contextmanager
    def link(self, node: str) -> Iterator[link_pb2.OpenLinkResponse]:
        """Have a link, as a node may."""
        opened = self.open(node)
        try:
            yield opened
        finally:
            with suppress(grpc.RpcError):
                self.close(opened.link_id)

    def close(self, link_id: bytes) -> None:
        self._stub.CloseLink(link_pb2.CloseLinkRequest(link_id=link_id), timeout=TIMEOUT)

    def confirm(self, node: str, bait: Bait, speaker: str) -> None:
        request = link_pb2.ConfirmRelayRequest(
            node=f"nodes/{node}", subject=f"{bait.owner}@{speaker}", region=bait.region, right=link_pb2.RIGHT_READ
        )
        self._stub.ConfirmRelay(request, timeout=TIMEOUT)

    def acquire(self, link: link_pb2.OpenLinkResponse, bait: Bait, speaker: str) -> link_pb2.Grant:
        wanted = link_pb2.AcquireGrant(
            link_id=link.link_id,
            epoch=link.epoch,
            region=bait.region,
            right=link_pb2.RIGHT_READ,
            subject=f"{bait.owner}@{speaker}",
            length=64,
        )
        return self._ask(link_pb2.GrantQuestion(number=1, acquire=wanted)).grant

    def release(self, link: link_pb2.OpenLinkResponse, grant: link_pb2.Grant) -> None:
        ended = link_pb2.ReleaseGrants(link_id=link.link_id, grant_ids=[grant.grant_id])
        self._ask(link_pb2.GrantQuestion(number=1, release=ended))

    def _ask(self, question: link_pb2.GrantQuestion) -> link_pb2.GrantAnswer:
        message = link_pb2.ExchangeGrantsRequest(questions=[question])
        for response in self._stub.ExchangeGrants(iter([message]), timeout=TIMEOUT):
            (answer,) = response.answers
            if answer.HasField("error"):
                raise from_proto(answer.error)
            return link_pb2.GrantAnswer.FromString(answer.SerializeToString())
        raise TimeoutError


def attempts(reach: Reach, others: Sequence[str], bait: Bait) -> Sequence[Attempt]:
    """Return what can be tried at a node; `others` are two more nodes, the first of which was taken over."""
    rogue, honest = others
    return (
        Attempt("open a link as a job", lambda: _as_job(reach, rogue)),
        Attempt("open a link over the unix socket", lambda: _over_socket(reach, rogue)),
        Attempt("confirm a relay as a job", lambda: _confirm_as_job(reach, rogue, bait)),
        Attempt("open a link as another node", lambda: _as_node(reach, rogue, lambda links: links.open(honest))),
        Attempt("speak of a client as a job", lambda: _speak(reach, "guest", bait, honest)),
        Attempt("speak of another node's client", lambda: _speak(reach, rogue, bait, honest)),
        Attempt("get a grant for another node's client", lambda: _forge(reach, rogue, honest, bait)),
        Attempt("get a grant for a client of the node itself", lambda: _forge(reach, rogue, reach.node, bait)),
        Attempt("use another node's link", lambda: _use_link(reach, rogue, honest, bait)),
        Attempt("close another node's link", lambda: _close_link(reach, rogue, honest)),
        Attempt("join a link with a wrong secret", lambda: _join_wrongly(reach, rogue)),
        Attempt("join a link with an old secret", lambda: _join_late(reach, rogue)),
        Attempt("forge a question on a rail", lambda: _forge_question(reach, rogue)),
        Attempt("use a key over another link", lambda: _use_key_elsewhere(reach, rogue, bait)),
        Attempt("use a key after its grant ended", lambda: _use_key_late(reach, rogue, bait)),
        Attempt("use a key beyond its range", lambda: _use_key_beyond(reach, rogue, bait)),
    )


def _as_job(reach: Reach, node: str) -> None:
    with reach.over_tls("guest") as channel:
        Links(channel).open(node)


def _over_socket(reach: Reach, node: str) -> None:
    with reach.local() as channel:
        Links(channel).open(node)


def _confirm_as_job(reach: Reach, node: str, bait: Bait) -> None:
    with reach.over_tls("guest") as channel:
        Links(channel).confirm(node, bait, reach.node)


def _as_node(reach: Reach, node: str, act: Any) -> None:
    with reach.over_tls(node) as channel:
        act(Links(channel))


def _speak(reach: Reach, who: str, bait: Bait, speaker: str) -> None:
    with reach.over_tls(who) as channel:
        Caller(channel, (("peermem-on-behalf-of", f"{bait.owner}@{speaker}"),)).move(bait.region, bait.region)


def _forge(reach: Reach, rogue: str, speaker: str, bait: Bait) -> None:
    with reach.over_tls(rogue) as channel:
        links = Links(channel)
        with links.link(rogue) as link:
            links.acquire(link, bait, speaker)


def _use_link(reach: Reach, rogue: str, honest: str, bait: Bait) -> None:
    with reach.over_tls(honest) as channel, Links(channel).link(honest) as link, reach.over_tls(rogue) as another:
        Links(another).acquire(link, bait, rogue)


def _close_link(reach: Reach, rogue: str, honest: str) -> None:
    with reach.over_tls(honest) as channel, Links(channel).link(honest) as link, reach.over_tls(rogue) as another:
        Links(another).close(link.link_id)


def _join_wrongly(reach: Reach, rogue: str) -> None:
    with reach.over_tls(rogue) as channel, Links(channel).link(rogue) as link:
        _dial(reach, link, random.randbytes(32)).close()


def _join_late(reach: Reach, rogue: str) -> None:
    with reach.over_tls(rogue) as channel:
        links = Links(channel)
        with links.link(rogue) as link:
            links.close(link.link_id)
        _dial(reach, link, link.secret).close()


def _use_key_elsewhere(reach: Reach, rogue: str, bait: Bait) -> None:
    with reach.over_tls(rogue) as channel:
        links = Links(channel)
        with links.link(rogue) as one, links.link(rogue) as another, closing(_join(reach, another)) as rail:
            _read(rail, links.acquire(one, bait, rogue).rkey)


def _use_key_late(reach: Reach, rogue: str, bait: Bait) -> None:
    with reach.over_tls(rogue) as channel:
        links = Links(channel)
        with links.link(rogue) as link, closing(_join(reach, link)) as rail:
            grant = links.acquire(link, bait, rogue)
            if not _is_readable(rail, grant.rkey):
                raise TimeoutError  # nothing to compare with
            links.release(link, grant)
            _read(rail, grant.rkey)


def _use_key_beyond(reach: Reach, rogue: str, bait: Bait) -> None:
    with reach.over_tls(rogue) as channel:
        links = Links(channel)
        with links.link(rogue) as link, closing(_join(reach, link)) as rail:
            _read(rail, links.acquire(link, bait, rogue).rkey, offset=60)


def _join(reach: Reach, link: link_pb2.OpenLinkResponse) -> socket.socket:
    """Join a link that is one's own. Raises OSError."""
    try:
        return _dial(reach, link, link.secret)
    except errors.AccessDenied as error:
        raise ConnectionError(error.message) from None


def _dial(reach: Reach, link: link_pb2.OpenLinkResponse, secret: bytes) -> socket.socket:
    """Return a connection that was welcomed. Raises AccessDenied where it was ended instead; OSError."""
    host, _, port = reach.fabric.rpartition(":")  # not over a wire, which ends connections itself
    sock = socket.create_connection((host, int(port)), TIMEOUT)
    try:
        greeting = tcp_proof.decode_greeting(_receive(sock, tcp_proof.GREETING_SIZE))
        nonce = tcp_proof.fresh_nonce()
        proofs = tcp_proof.Proofs(secret, link.link_id, greeting, nonce)
        sock.sendall(tcp_proof.encode_hello(tcp_proof.Hello(link.link_id, nonce, proofs.hello)))
        _unless_ended(sock, tcp_proof.WELCOME_SIZE)
    except BaseException:
        sock.close()
        raise
    return sock


def _unless_ended(sock: socket.socket, count: int) -> None:
    """Receive an answer. Raises AccessDenied where the connection is ended instead; OSError."""
    try:
        _receive(sock, count)
    except ConnectionError:
        raise errors.AccessDenied("The connection was ended.") from None


def _forge_question(reach: Reach, rogue: str) -> None:
    with reach.over_tls(rogue) as channel, Links(channel).link(rogue) as link, closing(_join(reach, link)) as rail:
        rail.sendall(frames.question_head(4) + random.randbytes(tcp_proof.MAC_SIZE + 4))
        _unless_ended(rail, 1)


def _is_readable(rail: socket.socket, rkey: int) -> bool:
    try:
        _read(rail, rkey)
    except errors.AccessDenied:
        return False
    return True


def _read(rail: socket.socket, rkey: int, offset: int = 0) -> None:
    """Read 16 bytes. Raises AccessDenied where the far end refuses; OSError."""
    head = frames.RequestHead(Opcode.READ, 1, 1, rkey, 16)
    rail.sendall(frames.encode_request(head, (offset,), (16,)))
    response = frames.decode_response(_receive(rail, frames.RESPONSE_SIZE))
    if not isinstance(response, frames.Response):
        raise ConnectionError("it carries something")
    if response.length is not None:
        _receive(rail, response.length + frames.RESPONSE_SIZE)
    elif response.status is Status.REM_ACCESS_ERR:
        raise errors.AccessDenied("The far end refused the key.")
    else:
        raise ConnectionError(f"the answer was {response.status.value}")


def _receive(rail: socket.socket, count: int) -> bytes:
    data = rail.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        raise ConnectionError("the connection ended")
    return data
