"""The HTTP door: liveness, readiness and metrics, for kubelet, Prometheus and people with curl; the page for browsers.

Rules of this file:

* It is up before anything else and needs nothing else: a daemon that can't start can still say so.
* Liveness says only that the event loop runs. It never depends on other nodes, nor on the NIC.
* One request for each connection, and a connection ends after `LIFETIME` whatever the client does:
  sends slowly, reads slowly, or nothing at all.
* The page is for callers of this host, who come by the loopback address: where the daemon listens on another one, it
  listens there, too, so that a tunnel (ssh, kubectl port-forward) finds it.
* A malformed request is the client's fault: it is answered with 400, and logged for debugging only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import web
from aiohttp.http import HttpProcessingError

from peermem.api.page.door import ROOM, Page
from peermem.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

LIFETIME = 15.0
"""Seconds; longer than Prometheus waits for a scrape."""
MAX_CONNECTIONS = 256
_INDEX = """peermem node daemon
/         for a browser on this host: what the node has and does now
/healthz  200 while the daemon lives
/readyz   200 when it takes work, else 503 and why not
/metrics  Prometheus or OpenMetrics
"""
_METHODS = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the daemon takes work."""

    ready: bool
    reasons: tuple[str, ...] = ()
    """Why not: one sentence for each condition that fails."""
    notes: tuple[str, ...] = ()
    """What is wrong without keeping it from work, in sentences."""


class HttpServer:
    """Serves one host:port until closed, and for the page's sake the same port of the loopback address."""

    def __init__(
        self,
        address: str,
        metrics: Metrics,
        health: Callable[[], Health],
        page: Page,
        lifetime: float = LIFETIME,
    ) -> None:
        """`lifetime` is what a connection gets, in seconds."""
        self.address = address
        """host:port; the real port once started."""
        self._metrics = metrics
        self._health = health
        self._page = page
        self._lifetime = lifetime
        self._connections: _Connections | None = None
        self._listeners: list[asyncio.Server] = []

    async def start(self) -> None:
        """Begin to serve. Raises OSError where the address can't be had, but not for the loopback address."""
        host, _, port = self.address.rpartition(":")
        self._connections = _Connections(
            self._answer,
            self._lifetime,
            request_factory=_request,
            access_log=None,
            logger=_Logger(logging.getLogger(__name__)),
            keepalive_timeout=self._lifetime,
            lingering_time=0.0,
            max_line_size=2048,
            max_field_size=4096,
            max_headers=64,
        )
        own, real, *_ = await self._listen(host.strip("[]"), int(port))
        self.address = f"{host}:{real}"
        beside = self._page.loopback_beside(own)
        if beside:
            try:
                await self._listen(beside, real)
            except OSError as error:
                log.warning("page_not_on_loopback", address=beside, port=real, cause=error.strerror)

    async def _listen(self, host: str, port: int) -> Any:
        """Listen; return the real address and port, and what else a socket's name has. Raises OSError."""
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(self._connections, host, port, reuse_address=True)  # type: ignore[arg-type]
        self._listeners.append(listener)
        return listener.sockets[0].getsockname()

    async def close(self) -> None:
        """End all connections and serve no more. Closing twice is no error."""
        listeners, self._listeners = self._listeners, []
        if listeners and self._connections:
            for listener in listeners:
                listener.close()
            self._connections.pre_shutdown()
            await self._connections.shutdown(timeout=0.5)
            self._connections.abort()
            await asyncio.gather(*(listener.wait_closed() for listener in listeners))

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        response = await self._route(request)
        response.force_close()
        return response

    async def _route(self, request: web.BaseRequest) -> web.Response:
        if request.method not in _METHODS:
            return web.Response(status=405, headers={"Allow": ", ".join(_METHODS)}, text="Only GET and HEAD.\n")
        match request.path:
            case "/" if "text/html" not in request.headers.get("Accept", ""):
                return web.Response(text=_INDEX)
            case path if path == "/" or path.startswith(ROOM):
                return await self._page.answer(request)
            case "/healthz":
                return web.Response(text="alive\n")
            case "/readyz":
                health = self._health()
                lines = ["ready"] if health.ready else ["not ready", *health.reasons]
                text = "\n".join((*lines, *health.notes))
                return web.Response(status=200 if health.ready else 503, text=text + "\n")
            case "/metrics":
                await self._metrics.refresh()
                body, content_type = self._metrics.render(request.headers.get("Accept", ""))
                return web.Response(body=body, headers={"Content-Type": content_type})
        return web.Response(status=404, text="There is /, /healthz, /readyz and /metrics.\n")


class _Connections(web.Server):
    """aiohttp's server with a bound on the number and the life of connections, which aiohttp has not."""

    def __init__(self, handler: Any, lifetime: float, **options: Any) -> None:
        super().__init__(handler, **options)
        self._lifetime = lifetime
        self._open: dict[web.RequestHandler, tuple[asyncio.Transport, asyncio.TimerHandle]] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        lifetime = self._lifetime if len(self._open) < MAX_CONNECTIONS else 0
        self._open[handler] = transport, asyncio.get_running_loop().call_later(lifetime, transport.abort)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self._open.pop(handler)[1].cancel()
        super().connection_lost(handler, exc)

    def abort(self) -> None:
        """End what is left, also where a client does not read."""
        for transport, _ in self._open.values():
            transport.abort()


class _Request(web.BaseRequest):
    """Answers that don't name their software, errors of aiohttp included."""

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers.popall("Server", None)
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"


def _request(message: Any, payload: Any, protocol: web.RequestHandler, writer: Any, task: Any) -> _Request:
    return _Request(message, payload, protocol, writer, task, asyncio.get_running_loop())


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """Keeps strangers from filling the log: what they send is no error of ours."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **options: Any) -> None:
        """See logging.Logger."""
        level = logging.DEBUG if isinstance(exc_info, HttpProcessingError) else logging.ERROR
        self.log(level, msg, *args, exc_info=exc_info, **options)
