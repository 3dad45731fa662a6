"""Any bytes on the HTTP port: an answer or the end of the connection, and never an error of the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.api.http import HttpServer
from peermem.api.page.door import Page
from peermem.telemetry.metrics import Metrics
from tests.api.test_http import connect, end, get, ready
from tests.fuzzing import fuzz, tried

GOOD = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: text/plain;version=0.0.4\r\nConnection: close\r\n\r\n"
PIECES = (
    *(b"GET ", b"POST ", b"/healthz", b"/readyz", b"/metrics", b"/%2e%2e/", b" HTTP/1.1", b" HTTP/9.9"),
    *(b"\r\n", b"\n", b"\0", b": ", b"0\r\n\r\n", b"Host: x", b"Content-Length: ", b"-1", b"99999999999999999999"),
    *(b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Upgrade: h2c", b"Connection: close"),
    *(b"/page/", b"facts.json", b"../door.py", b"main.js", b"Host: localhost", b"Host: [::1", b"Accept: text/html"),
    b"Accept: application/openmetrics-text; version=x",
)
requests = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
    st.builds(
        lambda position, change: GOOD[: position % len(GOOD)] + change + GOOD[position % len(GOOD) + 1 :],
        st.integers(0, 1000),
        st.binary(max_size=6),
    ),
)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


async def facts() -> dict[str, str]:
    return {"node": "a"}


@pytest.fixture(scope="module")
def server(runner: asyncio.Runner) -> Iterator[HttpServer]:
    page = Page()
    page.facts = facts
    server = HttpServer("127.0.0.1:0", Metrics("1.2.3"), ready, page)
    runner.run(server.start())
    yield server
    runner.run(server.close())


@fuzz(150)
@given(request=requests)
def test_any_request_is_answered(runner: asyncio.Runner, server: HttpServer, request: bytes) -> None:
    tried("HTTP requests")
    answer = runner.run(_ask(server, request))
    if answer:
        status = int(answer.split(b" ", 2)[1])
        assert answer.startswith(b"HTTP/1.")
        assert 100 <= status < 500, answer[:300]
    assert runner.run(get(server, "/healthz"))[0] == 200


async def _ask(server: HttpServer, request: bytes) -> bytes:
    reader, writer = await connect(server)
    received = b""
    with contextlib.suppress(ConnectionError):
        writer.write(request)
        writer.write_eof()
        async with asyncio.timeout(20):
            received = await reader.read()
    await end(writer)
    return received
