"""Calls to the Kubernetes API server, with the daemon's own token.

Rules of this file:

* The token and the authorities are read again when they change: both are renewed in the files.
* An answer is bounded in time and size. Redirects are not followed: the token goes to nobody else.
* The token is in no log and no error.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from peermem.credentials.watched import Watched, read_small

PATIENCE = 5.0
"""Seconds for one call."""
_LARGEST = 1 << 20
"""Bytes of an answer."""


@dataclass(frozen=True, slots=True)
class ApiServer:
    """Where it is, and who we are to it."""

    url: str
    ca: Path
    """PEM: who signs its certificate."""
    token: Path
    """The daemon's own token."""


class ApiCallError(Exception):
    """A call without a usable answer; its text is a clause that says why."""


class ApiClient:
    """Calls one API server."""

    def __init__(self, server: ApiServer) -> None:
        self.url = server.url
        self._server = server
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE))
        self._ca = Watched(server.ca)
        self._context: ssl.SSLContext | None = None

    async def close(self) -> None:
        """End the connections."""
        await self._session.close()

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Return the status and the body of the answer. Raises ApiCallError."""
        try:
            own = (await asyncio.to_thread(read_small, self._server.token)).decode("ascii").strip()
            context = await asyncio.to_thread(self._fresh_context)
            async with self._session.request(
                method,
                f"{self.url}{path}",
                json=body,
                headers={"Authorization": f"Bearer {own}"},
                ssl=context,
                allow_redirects=False,
            ) as answer:
                return answer.status, await _bounded(answer)
        except TimeoutError:
            raise ApiCallError(f"no answer within {PATIENCE:g} seconds") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiCallError(f"{type(error).__name__}: {error}") from None

    def _fresh_context(self) -> ssl.SSLContext:
        """Raises OSError, which ssl.SSLError is."""
        if self._ca.changed() or self._context is None:
            self._context = ssl.create_default_context(cafile=str(self._server.ca))
        return self._context


async def _bounded(answer: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for chunk in answer.content.iter_chunked(1 << 16):
        data += chunk
        if len(data) > _LARGEST:
            raise ApiCallError(f"its answer has more than {_LARGEST} bytes")
    return bytes(data)
