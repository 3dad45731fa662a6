"""Who gets the page: over real sockets, and by every address and name that a connection may come with."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from peermem.api.http import Health, HttpServer
from peermem.api.page.door import VIEWERS, Mode, Page
from peermem.telemetry.metrics import Metrics
from tests.api.test_http import exchange

BROWSER = "Accept: text/html,application/xhtml+xml\r\n"
FACTS = "/page/facts.json"
Answer = tuple[int, dict[str, str], str]


async def some_facts() -> Mapping[str, Any]:
    return {"node": {"name": "a"}}


@asynccontextmanager
async def serving(page: Page, address: str = "127.0.0.1:0") -> AsyncIterator[HttpServer]:
    server = HttpServer(address, Metrics("1"), lambda: Health(ready=True), page)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def ask(
    server: HttpServer, path: str = "/", host: str = "localhost", headers: str = BROWSER, method: str = "GET"
) -> Answer:
    named = f"Host: {host}\r\n" if host else ""
    return await exchange(server, f"{method} {path} HTTP/1.1\r\n{named}{headers}\r\n".encode())


def page(mode: Mode = "loopback", *names: str, facts: Callable[[], Awaitable[Any]] = some_facts) -> Page:
    made = Page(mode, names)
    made.facts = facts
    return made


async def test_a_browser_gets_the_page_and_others_the_index() -> None:
    async with serving(page()) as server:
        status, headers, body = await ask(server)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "<title>peermem</title>" in body
        for accept in ("", "Accept: */*\r\n"):
            status, headers, body = await ask(server, headers=accept)
            assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
            assert "/metrics" in body


@pytest.mark.parametrize(
    ("mode", "listens_on", "beside"),
    [
        ("loopback", "10.0.0.1", "127.0.0.1"),
        ("loopback", "fd00::2", "::1"),
        ("loopback", "127.0.0.1", ""),
        ("loopback", "::1", ""),
        ("loopback", "0.0.0.0", ""),
        ("loopback", "::", ""),
        ("everyone", "10.0.0.1", ""),
        ("off", "10.0.0.1", ""),
    ],
)
def test_only_a_page_for_this_host_needs_the_loopback_address(mode: Mode, listens_on: str, beside: str) -> None:
    assert page(mode).loopback_beside(listens_on) == beside


async def test_everything_that_the_page_names_is_there() -> None:
    async with serving(page()) as server:
        body = (await ask(server))[2]
        named = {part.split('"')[0] for part in body.split('"/page/')[1:]}
        assert {"page.css", "main.js", "uplot.js", "uplot.css", "icon.svg"} == named
        for name in named | {"dom.js", "machine.js", "plots.js", "tables.js", "words.js"}:
            assert (await ask(server, f"/page/{name}"))[0] == 200, name


async def test_nothing_but_the_files_is_there() -> None:
    async with serving(page()) as server:
        for path in ("door.py", "../door.py", "..%2fdoor.py", "%2e%2e/door.py", "uplot.LICENSE", "", "files/main.js"):
            assert (await ask(server, f"/page/{path}"))[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert (await ask(server, FACTS, method=method))[0] == 405
        status, _, body = await ask(server, FACTS, method="HEAD")
        assert (status, body) == (200, "")


async def test_no_answer_lets_a_stranger_in() -> None:
    async with serving(page()) as server:
        for path in ("/", "/page/main.js", FACTS, "/page/none"):
            _, headers, _ = await ask(server, path, headers=f"{BROWSER}Origin: http://evil.example\r\n")
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; ")
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert headers["Cache-Control"] == "no-store"
            assert not [name for name in headers if name.startswith("Access-Control")]


@pytest.mark.parametrize(
    ("mode", "remote", "local", "host", "status"),
    [
        ("loopback", "127.0.0.1", "127.0.0.1", "localhost:7472", 0),
        ("loopback", "127.8.9.10", "127.0.0.1", "127.0.0.1:7472", 0),
        ("loopback", "127.0.0.1", "127.0.0.1", "LOCALHOST", 0),
        ("loopback", "::1", "::1", "[::1]:7472", 0),
        ("loopback", "::1", "::1", "[::1]", 0),
        ("loopback", "::ffff:127.0.0.1", "::ffff:127.0.0.1", "127.0.0.1", 0),
        ("loopback", "127.0.0.1", "127.0.0.1", "gpu-01.example.org:80", 0),
        ("loopback", "10.0.0.9", "10.0.0.1", "10.0.0.1:7472", 403),
        ("loopback", "10.0.0.9", "10.0.0.1", "localhost", 403),
        ("loopback", "::ffff:10.0.0.9", "::ffff:10.0.0.1", "10.0.0.1", 403),
        ("loopback", "fe80::1%eth0", "fe80::2%eth0", "localhost", 403),
        ("loopback", "", "", "localhost", 403),
        ("loopback", "127.0.0.1", "127.0.0.1", "evil.example:7472", 421),
        ("loopback", "127.0.0.1", "127.0.0.1", "localhost.evil.example", 421),
        ("loopback", "127.0.0.1", "127.0.0.1", "evil-localhost", 421),
        ("loopback", "127.0.0.1", "127.0.0.1", "10.0.0.1", 421),
        ("loopback", "127.0.0.1", "127.0.0.1", "127.0.0.1.evil.example", 421),
        ("loopback", "127.0.0.1", "127.0.0.1", "[::1", 421),
        ("loopback", "127.0.0.1", "127.0.0.1", "", 421),
        ("everyone", "10.0.0.9", "10.0.0.1", "10.0.0.1:7472", 0),
        ("everyone", "fd00::9", "fd00::1", "[fd00::1]:7472", 0),
        ("everyone", "10.0.0.9", "10.0.0.1", "gpu-01.example.org", 0),
        ("everyone", "10.0.0.9", "10.0.0.1", "evil.example", 421),
        ("everyone", "10.0.0.9", "10.0.0.1", "10.0.0.2", 421),
        ("off", "127.0.0.1", "127.0.0.1", "localhost", 404),
    ],
)
def test_who_gets_it(mode: Mode, remote: str, local: str, host: str, status: int) -> None:
    refusal = page(mode, "gpu-01.example.org").refusal(remote, local, [host])
    assert (refusal.status if refusal else 0) == status


def test_one_host_is_named_by_a_request() -> None:
    for hosts in ([], ["localhost", "localhost"]):
        refusal = page().refusal("127.0.0.1", "127.0.0.1", hosts)
        assert refusal is not None
        assert refusal.status == 421


async def test_a_page_of_another_name_is_refused_with_all_that_belongs_to_it() -> None:
    async with serving(page()) as server:
        for path in ("/", "/page/main.js", FACTS):
            status, _, body = await ask(server, path, host="evil.example")
            assert (status, "http.names" in body) == (421, True)
        assert (await ask(server, "/metrics", host="evil.example"))[0] == 200


def own_address() -> str:
    """An address of this host that is not loopback's; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return ""
        return str(probe.getsockname()[0])


needs_address = pytest.mark.skipif(not own_address(), reason="this host has no address but loopback's")


@needs_address
async def test_a_caller_from_elsewhere_is_refused_whatever_it_says() -> None:
    lies = "X-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\n"
    async with serving(page(), f"{own_address()}:0") as server:
        for path in ("/", "/page/main.js", FACTS):
            status, _, body = await ask(server, path, headers=BROWSER + lies)
            assert (status, "ssh -L" in body) == (403, True)
        assert (await ask(server, "/healthz"))[0] == 200
    async with serving(page("everyone"), f"{own_address()}:0") as server:
        assert (await ask(server, FACTS, host=server.address))[0] == 200
        assert (await ask(server, FACTS, host="evil.example"))[0] == 421


@needs_address
async def test_who_listens_elsewhere_is_reached_through_a_tunnel_as_well() -> None:
    async with serving(page(), f"{own_address()}:0") as server:
        host, _, port = server.address.rpartition(":")
        assert host == own_address()
        assert (await ask(server))[0] == 403, "who comes from an address of this host is not known to be of it"
        tunnel = HttpServer(f"127.0.0.1:{port}", Metrics("1"), lambda: Health(ready=True), page())
        assert (await ask(tunnel, host="localhost:45000"))[0] == 200
        with pytest.raises(OSError, match="in use"):
            await tunnel.start()
    with pytest.raises(OSError, match="Connect call failed"):
        await ask(tunnel)


@needs_address
async def test_a_loopback_port_that_is_taken_is_told_and_nothing_else_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, capture_logs() as logs:
        port = taken.getsockname()[1]
        async with serving(page(), f"{own_address()}:{port}") as server:
            assert (await exchange(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
    assert [(entry["event"], entry["port"]) for entry in logs] == [("page_not_on_loopback", port)]


async def test_a_caller_of_this_host_is_not_refused_for_what_it_forwards() -> None:
    async with serving(page()) as server:
        assert (await ask(server, FACTS, headers="X-Forwarded-For: 203.0.113.9\r\n"))[0] == 200


async def test_off_is_off() -> None:
    async with serving(page("off")) as server:
        assert (await ask(server))[0] == 404
        assert (await ask(server, FACTS))[0] == 404
        assert (await ask(server, headers=""))[0] == 200


async def test_there_is_nothing_to_say_at_first() -> None:
    async with serving(Page()) as server:
        assert (await ask(server))[0] == 200
        status, _, body = await ask(server, FACTS)
        assert (status, body) == (503, "The daemon is starting.\n")


async def test_the_document_is_made_once_a_second_and_given_out_so_often() -> None:
    made = 0
    now = 100.0

    async def facts() -> Mapping[str, Any]:
        nonlocal made
        made += 1
        await asyncio.sleep(0)
        return {"made": made}

    door = Page(clock=lambda: now)
    door.facts = facts
    async with serving(door) as server:
        answers = await asyncio.gather(*(ask(server, FACTS) for _ in range(VIEWERS)))
        assert {(status, body) for status, _, body in answers} == {(200, '{"made":1}')}
        status, headers, _ = await ask(server, FACTS)
        assert (status, headers["Retry-After"]) == (429, "2")
        now += 1.0
        assert json.loads((await ask(server, FACTS))[2]) == {"made": 2}


async def test_it_is_packed_for_who_unpacks_it() -> None:
    async with serving(page()) as server:
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {FACTS} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip, br\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert b"Content-Encoding: gzip" in head
        assert json.loads(gzip.decompress(body)) == {"node": {"name": "a"}}


async def test_a_document_that_can_not_be_made_is_an_error_and_not_the_last_word() -> None:
    failing = True

    async def facts() -> Mapping[str, Any]:
        if failing:
            raise RuntimeError("defect")
        return {}

    async with serving(page(facts=facts)) as server:
        assert (await ask(server, FACTS))[0] == 500
        failing = False
        assert (await ask(server, FACTS))[0] == 200
