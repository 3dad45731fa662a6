"""Tokens of Kubernetes service accounts: the API server says whose they are (authentication.k8s.io/v1, TokenReview).

Rules of this file:

* A token counts only when it was issued for our audience; what was issued for the API server is no token of ours.
* What the API server says of a token is believed for a minute at most, and never beyond the token's own end.
* What is no token for us by its own words is refused without asking, so that a flood of nonsense ends here.
* Tokens are remembered by their digest, and are in no log and no error.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
import ssl
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from peermem.core.errors import AuthorityUnreachable, LimitReached, Unauthenticated
from peermem.core.identity import Subject
from peermem.credentials.watched import Watched, read_small

_BELIEVED = 60.0
"""Seconds."""
_REFUSED = 5.0
"""Seconds that a token stays refused without being asked about again."""
_KEPT = 4096
"""Tokens that are remembered."""
_AT_ONCE = 64
"""Reviews at the same time; more are refused."""
_PATIENCE = 5.0
"""Seconds for one review."""
_LONGEST = 12_000
"""Characters of a token; metadata holds 16 KiB in all."""
_LARGEST = 1 << 20
"""Bytes of an answer."""
_ACCOUNT = re.compile(r"system:serviceaccount:([a-z0-9-]{1,63}):([a-z0-9.-]{1,220})", re.ASCII)
_NODE_NAME = "authentication.kubernetes.io/node-name"


class _User(msgspec.Struct):
    username: str = ""
    extra: dict[str, list[str]] = {}


class _Status(msgspec.Struct):
    authenticated: bool = False
    user: _User = msgspec.field(default_factory=_User)
    audiences: list[str] = []


class _Review(msgspec.Struct):
    status: _Status


class _Claims(msgspec.Struct):
    aud: str | list[str] = ""
    exp: float = float("inf")


@dataclass(frozen=True, slots=True)
class ApiServer:
    """Where tokens are reviewed, and what for."""

    url: str
    ca: Path
    """PEM: who signs its certificate."""
    token: Path
    """The daemon's own token."""
    audience: str
    node: str | None
    """Kubernetes' name of this node, where tokens that are bound to pods of others are refused."""


@dataclass(frozen=True, slots=True)
class _Known:
    until: float
    """By the monotonic clock."""
    outcome: Subject | Unauthenticated


class TokenReviewer:
    """Asks the API server, and remembers its answers for a while."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_PATIENCE))
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Subject]] = {}
        self._ca = Watched(server.ca)
        self._context: ssl.SSLContext | None = None

    async def close(self) -> None:
        """End the connections."""
        for task in self._asking.values():
            task.cancel()
        await self._session.close()

    async def review(self, token: str) -> Subject:
        """Return whose token it is. Raises Unauthenticated, AuthorityUnreachable, LimitReached."""
        digest = hashlib.sha256(token.encode()).digest()
        known = self._known.get(digest)
        if known is not None and time.monotonic() < known.until:
            return _granted(known.outcome)
        task = self._asking.get(digest)
        if task is None:
            end = self._end_by_its_own_words(token)
            if len(self._asking) >= _AT_ONCE:
                raise LimitReached(f"{_AT_ONCE} tokens are being reviewed, the limit. Try again.", limit=_AT_ONCE)
            task = asyncio.get_running_loop().create_task(self._reviewed(digest, token, end))
            self._asking[digest] = task
            task.add_done_callback(lambda done: self._asked(digest, done))
        return await asyncio.shield(task)

    def _asked(self, digest: bytes, task: asyncio.Task[Subject]) -> None:
        del self._asking[digest]
        if not task.cancelled():
            task.exception()  # the caller may have gone away meanwhile

    def _end_by_its_own_words(self, token: str) -> float:
        """Return when a token ends, in seconds since 1970. Raises Unauthenticated where it is none for us."""
        parts = token.split(".")
        if len(parts) != 3 or len(token) > _LONGEST:
            raise Unauthenticated("The token is no JSON Web Token, as those of service accounts are.")
        try:
            claims = msgspec.json.decode(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)), type=_Claims)
        except (binascii.Error, ValueError):
            raise Unauthenticated("The token is no JSON Web Token, as those of service accounts are.") from None
        if self._server.audience not in ([claims.aud] if isinstance(claims.aud, str) else claims.aud):
            raise self._other_audience()
        if claims.exp <= time.time():
            raise Unauthenticated("The token has expired. Read the file again that it is in: it is renewed there.")
        return claims.exp

    def _other_audience(self) -> Unauthenticated:
        return Unauthenticated(
            f"The token was not issued for the audience {self._server.audience!r}. Project one into the pod with that "
            "audience (serviceAccountToken.audience).",
            audience=self._server.audience,
        )

    async def _reviewed(self, digest: bytes, token: str, end: float) -> Subject:
        status = await self._ask(token)
        outcome = self._judged(status)
        lasts = _REFUSED if isinstance(outcome, Unauthenticated) else min(_BELIEVED, end - time.time())
        self._known[digest] = _Known(time.monotonic() + lasts, outcome)
        self._known.move_to_end(digest)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return _granted(outcome)

    def _judged(self, status: _Status) -> Subject | Unauthenticated:
        if not status.authenticated:
            return Unauthenticated("The Kubernetes API server does not know the token (any more). Show a fresh one.")
        if self._server.audience not in status.audiences:
            return self._other_audience()
        found = _ACCOUNT.fullmatch(status.user.username)
        if found is None:
            return Unauthenticated("The token is not of a service account, and no other counts here.")
        nodes = status.user.extra.get(_NODE_NAME, [])
        if self._server.node and nodes and nodes != [self._server.node]:
            return Unauthenticated(
                f"The token is bound to a pod of the Kubernetes node {nodes[0][:80]}, and this daemon serves those of "
                f"{self._server.node}. Connect to the daemon of the pod's own node.",
                node=nodes[0][:80],
            )
        return Subject(f"kubernetes:{found[1]}/{found[2]}")

    async def _ask(self, token: str) -> _Status:
        """Raises AuthorityUnreachable."""
        spec = {"token": token, "audiences": [self._server.audience]}
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        try:
            own = (await asyncio.to_thread(read_small, self._server.token)).decode("ascii").strip()
            context = await asyncio.to_thread(self._fresh_context)
            async with self._session.post(
                f"{self._server.url}/apis/authentication.k8s.io/v1/tokenreviews",
                json=review,
                headers={"Authorization": f"Bearer {own}"},
                ssl=context,
                allow_redirects=False,
            ) as answer:
                return await self._status(answer)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._unreachable(_cause(error)) from None

    async def _status(self, answer: aiohttp.ClientResponse) -> _Status:
        """Raises AuthorityUnreachable, ValueError, aiohttp.ClientError."""
        if answer.status not in (200, 201):
            raise self._unreachable(f"it answered {answer.status}")
        data = bytearray()
        async for chunk in answer.content.iter_chunked(1 << 16):
            data += chunk
            if len(data) > _LARGEST:
                raise self._unreachable(f"its answer has more than {_LARGEST} bytes")
        return msgspec.json.decode(data, type=_Review).status

    def _fresh_context(self) -> ssl.SSLContext:
        """Raises OSError, which ssl.SSLError is."""
        if self._ca.changed() or self._context is None:
            self._context = ssl.create_default_context(cafile=str(self._server.ca))
        return self._context

    def _unreachable(self, cause: str) -> AuthorityUnreachable:
        return AuthorityUnreachable(
            f"The Kubernetes API server at {self._server.url} did not review the token ({cause}). Try again; check "
            "kubernetes.api_server and its ca, and that the daemon's own token may create TokenReviews.",
            server=self._server.url,
        )


def _granted(outcome: Subject | Unauthenticated) -> Subject:
    """Raises Unauthenticated."""
    if isinstance(outcome, Unauthenticated):
        raise outcome.again()
    return outcome


def _cause(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_PATIENCE:g} seconds"
    if isinstance(error, msgspec.MsgspecError):
        return "its answer is no TokenReview"
    return f"{type(error).__name__}: {error}"
