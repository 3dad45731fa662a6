"""Who gets the page, and its answers.

Rules of this file:

* The page names regions, their owners and labels, so it is for callers of this host, unless the configuration says
  otherwise in words. Who calls is the address of the connection; what a request says of it counts for nothing.
* A name that the caller's browser resolved may be a stranger's (DNS rebinding): the Host header has to be localhost,
  the address that the connection came to, or a name of the configuration. No other origin is let in.
* Nothing is run but the files beside this one: the Content-Security-Policy allows no more.
* The document is made at most once in `STEP` seconds, and given out `VIEWERS` times at most, however many ask.
"""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import json
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Literal

from aiohttp import web

from peermem.offload import in_thread

STEP = 1.0
VIEWERS = 32
"""Answers that one document is given out in."""
ROOM = "/page/"
"""Begins the paths of everything but the page itself."""
Mode = Literal["loopback", "everyone", "off"]
_FILES = Path(__file__).parent / "files"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a caller does not get the page."""

    status: int
    sentence: str


@dataclass(slots=True)
class _Document:
    body: bytes
    packed: bytes
    """With gzip."""
    made_at: float
    left: int = VIEWERS
    """How often it may be given out yet."""


class Page:
    """Answers requests for the page and what belongs to it."""

    def __init__(
        self, mode: Mode = "loopback", names: Collection[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`names` are what hosts may call this one, in lower case."""
        self.facts: Callable[[], Awaitable[Mapping[str, Any]]] | None = None
        """Makes the document; None as long as there is nothing to say."""
        self._mode = mode
        self._names = frozenset(names)
        self._clock = clock
        self._files = {file.name: file.read_bytes() for file in _FILES.iterdir() if file.suffix in _TYPES}
        self._making = asyncio.Lock()
        self._last: _Document | None = None

    def loopback_beside(self, listens_on: str) -> str:
        """Return the loopback address that callers of this host need as well, to get the page of a daemon that listens
        on an address; empty for none."""
        address = _address(listens_on)
        if self._mode != "loopback" or address is None or address.is_loopback or address.is_unspecified:
            return ""
        return "127.0.0.1" if address.version == 4 else "::1"

    def refusal(self, remote: str, local: str, hosts: Collection[str]) -> Refusal | None:
        """Return why a connection from address `remote` to address `local`, whose request has these Host headers, does
        not get the page; None where it does."""
        if self._mode == "off":
            return Refusal(404, "The page is off: http.page in the daemon's configuration says so.")
        if self._mode == "loopback" and not _is_loopback(remote):
            return Refusal(
                403,
                "The page names regions and their owners, so it is for this host: reach it through a tunnel, such as "
                "'ssh -L 7472:127.0.0.1:7472 HOST', or set http.page.",
            )
        if len(hosts) != 1 or not self._is_own(_host(next(iter(hosts))), local):
            return Refusal(
                421,
                "The page is shown as localhost, as the address that it is reached at, or as a name in http.names of "
                "the daemon's configuration, and as no other.",
            )
        return None

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """Answer a GET or HEAD for a path of the page."""
        refusal = self._refusal(request)
        if refusal is not None:
            return web.Response(status=refusal.status, text=f"{refusal.sentence}\n", headers=_HEADERS)
        name = request.path.removeprefix(ROOM) if request.path != "/" else "index.html"
        if name == "facts.json":
            return await self._facts(request)
        body = self._files.get(name)
        if body is None:
            return web.Response(status=404, text="The page has no such file.\n", headers=_HEADERS)
        return web.Response(body=body, headers={"Content-Type": _TYPES[Path(name).suffix], **_HEADERS})

    def _refusal(self, request: web.BaseRequest) -> Refusal | None:
        if request.transport is None:
            return Refusal(400, "The connection is over.")
        remote, local = (request.transport.get_extra_info(end)[0] for end in ("peername", "sockname"))
        return self.refusal(remote, local, request.headers.getall("Host", ()))

    def _is_own(self, host: str, local: str) -> bool:
        if host == "localhost" or host in self._names:
            return True
        address = _address(host)
        return address is not None and (address.is_loopback or address == _address(local))

    async def _facts(self, request: web.BaseRequest) -> web.Response:
        if self.facts is None:
            return web.Response(status=503, text="The daemon is starting.\n", headers=_HEADERS)
        async with self._making:
            if self._last is None or self._clock() >= self._last.made_at + STEP:
                self._last = await self._make(self.facts)
            document = self._last
        if not document.left:
            text = f"More than {VIEWERS} look at this page: ask again.\n"
            return web.Response(status=429, text=text, headers={"Retry-After": "2", **_HEADERS})
        document.left -= 1
        headers = {"Content-Type": "application/json", "Vary": "Accept-Encoding", **_HEADERS}
        if "gzip" not in request.headers.get("Accept-Encoding", ""):
            return web.Response(body=document.body, headers=headers)
        return web.Response(body=document.packed, headers={"Content-Encoding": "gzip", **headers})

    async def _make(self, facts: Callable[[], Awaitable[Mapping[str, Any]]]) -> _Document:
        made_at = self._clock()
        made = await facts()

        def encode() -> tuple[bytes, bytes]:
            body = json.dumps(made, separators=(",", ":")).encode()
            return body, gzip.compress(body, 1)

        return _Document(*await in_thread(encode), made_at)


def _host(header: str) -> str:
    """Return the host of a Host header, without its port and brackets; nothing for one that is malformed."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9.-]+))(?::[0-9]*)?", header.strip().lower(), re.ASCII)
    return (found[1] or found[2]) if found else ""


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Return an address; one of IPv4 also where IPv6 wraps it."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _is_loopback(text: str) -> bool:
    address = _address(text)
    return address is not None and address.is_loopback
