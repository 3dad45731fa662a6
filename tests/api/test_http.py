"""The HTTP door, over real sockets."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from peermem.api.http import LIFETIME, MAX_CONNECTIONS, Health, HttpServer
from peermem.api.page.door import Page
from peermem.telemetry.metrics import GrpcMethod, Metrics


def ready() -> Health:
    return Health(ready=True)


@asynccontextmanager
async def serving(
    health: Callable[[], Health] = ready,
    metrics: Metrics | None = None,
    lifetime: float = LIFETIME,
    address: str = "127.0.0.1:0",
) -> AsyncIterator[HttpServer]:
    server = HttpServer(address, metrics or Metrics("1.2.3"), health, Page(), lifetime)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    async with serving() as server:
        yield server


async def connect(server: HttpServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = server.address.rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port))


async def end(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def exchange(server: HttpServer, request: bytes) -> tuple[int, dict[str, str], str]:
    """Return status, headers and body of the answer; it ends with the connection."""
    reader, writer = await connect(server)
    writer.write(request)
    async with asyncio.timeout(10):
        answer = await reader.read()
    await end(writer)
    head, _, body = answer.decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


async def get(server: HttpServer, path: str, method: str = "GET", headers: str = "") -> tuple[int, dict[str, str], str]:
    return await exchange(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())


async def test_liveness_and_the_index(server: HttpServer) -> None:
    assert (await get(server, "/healthz"))[::2] == (200, "alive\n")
    status, headers, body = await get(server, "/")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert all(path in body for path in ("/healthz", "/readyz", "/metrics"))


async def test_readiness_says_why_not() -> None:
    healths = [Health(ready=True), Health(ready=False, reasons=("The directory is not joined.", "No device is open."))]
    async with serving(health=healths.pop) as server:
        status, _, body = await get(server, "/readyz")
        assert (status, body) == (503, "not ready\nThe directory is not joined.\nNo device is open.\n")
        status, _, body = await get(server, "/readyz?verbose")
        assert (status, body) == (200, "ready\n")


async def test_what_is_wrong_without_keeping_it_from_work_is_told_too() -> None:
    async with serving(health=lambda: Health(ready=True, notes=("The policy file is refused.",))) as server:
        status, _, body = await get(server, "/readyz")
        assert (status, body) == (200, "ready\nThe policy file is refused.\n")


async def test_liveness_does_not_depend_on_readiness() -> None:
    async with serving(health=lambda: Health(ready=False)) as server:
        assert (await get(server, "/healthz"))[0] == 200


async def test_metrics_in_the_form_that_is_asked_for(server: HttpServer) -> None:
    status, headers, body = await get(server, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'peermem_build_info{node="' in body
    accept = "Accept: application/openmetrics-text;version=1.0.0;q=0.7,text/plain;q=0.3\r\n"
    _, headers, body = await get(server, "/metrics", headers=accept)
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith("# EOF\n")


async def test_what_there_is_not(server: HttpServer) -> None:
    for path in ("/metrics/", "/healthzz", "/..", "/%2e", "*", "http://other/metricsx"):
        assert (await get(server, path))[0] in (400, 404), path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        status, headers, _ = await get(server, "/metrics", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")


async def test_head_has_no_body(server: HttpServer) -> None:
    status, headers, body = await get(server, "/healthz", "HEAD")
    assert (status, headers["Content-Length"], body) == (200, "6", "")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(1000)) + b"\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=["tls", "http2", "header", "long line", "long field", "many fields", "length"],
)
async def test_a_malformed_request_is_refused_and_fills_no_log(
    server: HttpServer, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        status, headers, _ = await exchange(server, request_bytes)
    assert status == 400
    assert "Server" not in headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert not caplog.records
    assert (await get(server, "/healthz"))[0] == 200


async def test_no_answer_names_its_software(server: HttpServer) -> None:
    for path in ("/", "/metrics", "/none"):
        assert "Server" not in (await get(server, path))[1]


async def test_a_health_that_fails_is_an_error_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def health() -> Health:
        raise RuntimeError("defect")

    async with serving(health=health) as server:
        status, _, body = await get(server, "/readyz")
    assert status == 500
    assert "defect" not in body
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET / HTT",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: ",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    ],
    ids=["nothing", "line", "header", "body"],
)
async def test_a_client_that_sends_slowly_is_dropped(start: bytes) -> None:
    async with serving(lifetime=0.05) as server:
        reader, writer = await connect(server)
        writer.write(start)
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        await end(writer)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def connections(server: HttpServer) -> int:
    """Return how many connections the server's end has open, by the kernel's table (proc(5), /proc/net/tcp)."""
    local = f":{int(server.address.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(local) and row[3] == "01" for row in rows)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  the kernel's tables raise no event
            await asyncio.sleep(0.001)


@contextlib.contextmanager
def asking_and_not_reading(server: HttpServer) -> Iterator[None]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(server.address.rpartition(":")[2])))
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        yield


def many_metrics() -> Metrics:
    """Return metrics that make a page larger than what the kernel takes off a sender's hands."""
    metrics = Metrics("1")
    metrics.serve_grpc(GrpcMethod("service", f"method{i:0100}", "unary") for i in range(2000))
    return metrics


async def test_a_client_that_reads_nothing_is_dropped() -> None:
    async with serving(metrics=many_metrics(), lifetime=0.2) as server:
        with asking_and_not_reading(server):
            assert connections(server) == 1
            await until(lambda: connections(server) == 0)


async def test_closing_does_not_wait_for_a_client_that_reads_nothing() -> None:
    async with serving(metrics=many_metrics(), lifetime=1000) as server:
        with asking_and_not_reading(server):
            assert await get(server, "/healthz") == await get(server, "/healthz")  # so the other one is served, too
            assert connections(server) == 1
            await server.close()
            await until(lambda: connections(server) == 0)


async def test_connections_beyond_the_bound_are_dropped(server: HttpServer) -> None:
    held = [await connect(server) for _ in range(MAX_CONNECTIONS)]
    reader, writer = await connect(server)
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    await end(writer)
    before = open_files()
    for _, writer in held:
        await end(writer)
    await until(lambda: open_files() <= before - 2 * MAX_CONNECTIONS)
    assert (await get(server, "/healthz"))[0] == 200


async def test_one_request_for_each_connection(server: HttpServer) -> None:
    status, headers, body = await exchange(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
    assert (status, headers["Connection"], body) == (200, "close", "alive\n")


async def test_closing_ends_connections_and_leaves_nothing_open() -> None:
    before = open_files()
    server = HttpServer("127.0.0.1:0", Metrics("1"), ready, Page())
    await server.close()
    await server.start()
    reader, writer = await connect(server)
    await get(server, "/healthz")
    await server.close()
    await server.close()
    assert await reader.read() == b""
    await end(writer)
    with pytest.raises(ConnectionRefusedError):
        await connect(server)
    assert open_files() <= before


async def test_a_port_in_use_is_an_error(server: HttpServer) -> None:
    with pytest.raises(OSError, match="in use"):
        await HttpServer(server.address, Metrics("1"), ready, Page()).start()


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6_loopback(), reason="this host has no IPv6 loopback address")
async def test_an_ipv6_address() -> None:
    async with serving(address="[::1]:0") as server:
        assert server.address.startswith("[::1]:")
        assert (await get(server, "/healthz"))[0] == 200
