"""Tokens of Kubernetes service accounts, reviewed by a small API server over real HTTPS."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc

import peermem.aio
from peermem import errors
from peermem.api.kubernetes import TokenReviewer
from peermem.config import Kubernetes, ListenAddress
from peermem.config_values import FilePath, HttpsUrl
from peermem.core.identity import Subject
from peermem.v1 import node_pb2, node_pb2_grpc, region_pb2, region_pb2_grpc
from tests.api_server import FakeApiServer, token
from tests.certificates import Authority
from tests.trusting import Node, caller, fault, free_ports, nodes

AUTHORITY = Authority()
DEEP = base64.urlsafe_b64encode(b'{"aud": "peermem", "x": ' + b"[" * 8000).decode()
LOADER = Subject("kubernetes:training/loader")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer(tmp_path, AUTHORITY).serving() as server:
        yield server


@pytest.fixture
async def reviewer(server: FakeApiServer) -> AsyncIterator[TokenReviewer]:
    async with reviewing(server, node="node-7") as reviewer:
        yield reviewer


@asynccontextmanager
async def reviewing(server: FakeApiServer, node: str | None = None) -> AsyncIterator[TokenReviewer]:
    reviewer = server.reviewer(node=node)
    try:
        yield reviewer
    finally:
        await reviewer.close()


async def test_a_token_is_its_service_account_and_is_reviewed_for_our_audience(
    server: FakeApiServer, reviewer: TokenReviewer
) -> None:
    good = server.knows(token(), node_name=["node-7"], pod_name=["loader-0"])
    assert await reviewer.review(good) == LOADER
    assert [asked["spec"] for asked in server.asked] == [{"token": good, "audiences": ["peermem"]}]
    assert await reviewer.review(good) == LOADER
    assert len(server.asked) == 1, "it is believed for a while"
    assert await reviewer.review(server.knows(token(["other", "peermem"], jti="2"))) == LOADER


async def test_what_the_api_server_says_is_not_believed_for_longer_than_the_token_lasts(
    server: FakeApiServer, reviewer: TokenReviewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = server.knows(token(ends_in=30))
    long = server.knows(token(ends_in=3600))
    for each in (short, long):
        assert await reviewer.review(each) == LOADER
    now, wall = time.monotonic(), time.time()
    monkeypatch.setattr("time.monotonic", lambda: now + 31)
    monkeypatch.setattr("time.time", lambda: wall + 31)
    with pytest.raises(errors.Unauthenticated, match="has expired"):
        await reviewer.review(short)
    assert await reviewer.review(long) == LOADER
    assert len(server.asked) == 2
    monkeypatch.setattr("time.monotonic", lambda: now + 61)
    del server.known[long]
    with pytest.raises(errors.Unauthenticated, match="does not know the token"):
        await reviewer.review(long)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no JSON Web Token"),
        ("a.b", "no JSON Web Token"),
        ("a.b.c", "no JSON Web Token"),
        ("a.ÿ.c", "no JSON Web Token"),
        ("a." + "x" * 20_000 + ".c", "no JSON Web Token"),
        (f"a.{DEEP}.c", "no JSON Web Token"),
        (token("https://kubernetes.default.svc"), "not issued for the audience 'peermem'"),
        (token([]), "not issued for the audience 'peermem'"),
        (token(ends_in=-1), "has expired"),
    ],
)
async def test_what_is_none_for_us_by_its_own_words_is_refused_without_asking(
    server: FakeApiServer, reviewer: TokenReviewer, text: str, cause: str
) -> None:
    with pytest.raises(errors.Unauthenticated, match=cause):
        await reviewer.review(text)
    assert server.asked == []


async def test_what_the_api_server_does_not_stand_for_is_refused(
    server: FakeApiServer, reviewer: TokenReviewer
) -> None:
    for number, (text, cause) in enumerate(
        (
            (token(jti="forged"), "does not know the token"),
            (server.knows(token(jti="a"), audiences=()), "not issued for the audience"),
            (server.knows(token(jti="b"), audiences=("api",)), "not issued for the audience"),
            (server.knows(token(jti="c"), user="system:node:node-7"), "not of a service account"),
            (server.knows(token(jti="d"), user="system:serviceaccount:a:b@c"), "not of a service account"),
            (server.knows(token(jti="e"), node_name=["node-8"]), "a pod of the Kubernetes node node-8"),
        )
    ):
        for _ in range(2):
            with pytest.raises(errors.Unauthenticated, match=cause) as caught:
                await reviewer.review(text)
            assert text not in str(caught.value)
        assert len(server.asked) == number + 1, "it stays refused for a while without being asked about"


async def test_pods_of_other_nodes_are_let_in_where_the_configuration_does_not_mind(server: FakeApiServer) -> None:
    async with reviewing(server) as reviewer:
        assert await reviewer.review(server.knows(token(), node_name=["node-8"])) == LOADER


async def test_only_so_many_tokens_are_remembered(
    server: FakeApiServer, reviewer: TokenReviewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peermem.api.kubernetes._KEPT", 3)
    tokens = [server.knows(token(jti=str(number))) for number in range(5)]
    for each in (*tokens, tokens[-1], tokens[0]):
        assert await reviewer.review(each) == LOADER
    assert [asked["spec"]["token"] for asked in server.asked] == [*tokens, tokens[0]]


async def test_callers_with_the_same_token_ask_once(server: FakeApiServer, reviewer: TokenReviewer) -> None:
    server.gate.clear()
    good = server.knows(token())
    waiting = [asyncio.create_task(reviewer.review(good)) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    server.gate.set()
    assert await asyncio.gather(*waiting[1:]) == [LOADER] * 4
    assert len(server.asked) == 1


async def test_a_flood_of_tokens_is_refused_beyond_a_bound(server: FakeApiServer, reviewer: TokenReviewer) -> None:
    server.gate.clear()
    waiting = [asyncio.create_task(reviewer.review(token(jti=str(number)))) for number in range(80)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    refused = [task for task in waiting if task.done()]
    assert {type(task.exception()) for task in refused} == {errors.LimitReached}
    assert len(refused) == 16
    server.gate.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert sum(isinstance(outcome, errors.Unauthenticated) for outcome in outcomes) == 64


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (web.Response(status=500), "it answered 500"),
        (web.Response(status=302, headers={"Location": "https://example.org"}), "it answered 302"),
        (web.Response(text="nonsense"), "its answer is no TokenReview"),
        (web.Response(text='{"status": {"authenticated": 1}}'), "its answer is no TokenReview"),
        (web.Response(body=b" " * (1 << 20 | 1)), "its answer has more than"),
    ],
)
async def test_an_answer_that_makes_no_sense_lets_nobody_in(
    server: FakeApiServer, reviewer: TokenReviewer, answer: web.Response, cause: str
) -> None:
    server.answer = answer
    with pytest.raises(errors.AuthorityUnreachable, match=cause):
        await reviewer.review(server.knows(token()))


async def test_an_api_server_that_can_not_be_asked_lets_nobody_in(
    server: FakeApiServer, reviewer: TokenReviewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = server.knows(token())
    (server.folder / "own").write_text("revoked")
    with pytest.raises(errors.AuthorityUnreachable, match="it answered 401"):
        await reviewer.review(good)
    (server.folder / "own").unlink()
    with pytest.raises(errors.AuthorityUnreachable, match="No such file"):
        await reviewer.review(good)
    (server.folder / "own").write_text("the-daemons-own")
    (server.folder / "ca.pem").write_bytes(Authority("another authority").pem)
    with pytest.raises(errors.AuthorityUnreachable, match="certificate verify failed"):
        await reviewer.review(good)
    (server.folder / "ca.pem").write_bytes(AUTHORITY.pem)
    assert await reviewer.review(good) == LOADER, "both files are read again"


async def test_an_api_server_that_is_silent_is_given_up(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peermem.api.api_server.PATIENCE", 0.1)
    server.gate.clear()
    async with reviewing(server) as reviewer:
        with pytest.raises(errors.AuthorityUnreachable, match=r"no answer within 0\.1 seconds"):
            await reviewer.review(server.knows(token()))


async def owner(channel: grpc.aio.Channel, shown: str = "") -> str:
    stub: region_pb2_grpc.RegionServiceAsyncStub = region_pb2_grpc.RegionServiceStub(channel)
    made = await stub.CreateRegion(
        region_pb2.CreateRegionRequest(device="bar0", length=1),
        metadata=(("authorization", shown),) if shown else (),
        timeout=10,
    )
    return made.owner


async def refused(channel: grpc.aio.Channel, shown: str = "") -> errors.PeermemError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await owner(channel, shown)
    return fault(caught.value)


class TestDaemon:
    """A daemon that listens for tokens."""

    @pytest.fixture(params=[False, True], ids=["nobody unknown", "anonymous"])
    async def node(
        self, tmp_path: Path, server: FakeApiServer, request: pytest.FixtureRequest
    ) -> AsyncIterator[tuple[Node, str]]:
        port = free_ports(1)[0]
        table = Kubernetes(
            api_server=HttpsUrl(server.url),
            ca=FilePath(str(server.folder / "ca.pem")),
            token=FilePath(str(server.folder / "own")),
        )
        async with nodes(
            tmp_path,
            ("a",),
            AUTHORITY,
            kubernetes=table,
            token_address=ListenAddress(f"127.0.0.1:{port}"),
            anonymous=request.param,
        ) as (node,):
            yield node, f"127.0.0.1:{port}"

    async def test_a_token_is_shown_over_tls_and_over_the_unix_socket(
        self, node: tuple[Node, str], server: FakeApiServer
    ) -> None:
        a, address = node
        good = server.knows(token())
        async with caller(a, None, address) as channel:
            assert await owner(channel, f"Bearer {good}") == "kubernetes:training/loader"
            assert await owner(channel, f"bearer  {good}") == "kubernetes:training/loader"
            for shown in (f"Basic {good}", f"Bearer {token(jti='forged')}", "Bearer", f"Bearer {token('api')}"):
                told = await refused(channel, shown)
                assert isinstance(told, errors.Unauthenticated)
                assert good not in told.message
        async with grpc.aio.insecure_channel(a.target) as channel:
            assert await owner(channel, f"Bearer {good}") == "kubernetes:training/loader"

    async def test_what_a_pod_maps_belongs_to_its_service_account(
        self, node: tuple[Node, str], server: FakeApiServer, tmp_path: Path
    ) -> None:
        file = tmp_path / "token"
        file.write_text(server.knows(token()))
        async with await peermem.aio.connect(node[0].target, tls=peermem.Tls(token_file=file)) as pod:
            region = await pod.create_region(device="bar0", length=1)
            assert [each.owner async for each in pod.regions()] == ["kubernetes:training/loader"]
            (await region.map())[:] = b"x"
            assert await region.read() == b"x"
        file.write_text(token(jti="forged"))
        with pytest.raises(errors.Unauthenticated, match="does not know the token"):
            await peermem.aio.connect(node[0].target, tls=peermem.Tls(token_file=file))

    async def test_health_is_told_to_everybody(self, node: tuple[Node, str], request: pytest.FixtureRequest) -> None:
        async with caller(node[0], None, node[1]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            if "anonymous" not in request.node.callspec.id:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await anext(aiter(health.Watch(health_pb2.HealthCheckRequest())))
                assert isinstance(fault(caught.value), errors.Unauthenticated), "who watches takes a place"

    async def test_who_shows_nothing_is_let_in_only_where_the_configuration_says_so(
        self, node: tuple[Node, str], request: pytest.FixtureRequest
    ) -> None:
        a, address = node
        anonymous = "anonymous" in request.node.callspec.id
        async with caller(a, None, address) as channel:
            nodes: node_pb2_grpc.NodeServiceAsyncStub = node_pb2_grpc.NodeServiceStub(channel)
            if anonymous:
                assert await owner(channel) == "anonymous"
                assert (await nodes.GetNode(node_pb2.GetNodeRequest())).name == "nodes/a"
            else:
                assert isinstance(await refused(channel), errors.Unauthenticated)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await nodes.GetNode(node_pb2.GetNodeRequest())
                assert isinstance(fault(caught.value), errors.Unauthenticated)
