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
import time
from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from peermem.api.api_server import ApiCallError, ApiClient
from peermem.core.errors import AuthorityUnreachable, LimitReached, Unauthenticated
from peermem.core.identity import Subject

_BELIEVED = 60.0
"""Seconds."""
_REFUSED = 5.0
"""Seconds that a token stays refused without being asked about again."""
_KEPT = 4096
"""Tokens that are remembered."""
_AT_ONCE = 64
"""Reviews at the same time; more are refused."""
_LONGEST = 12_000
"""Characters of a token; metadata holds 16 KiB in all."""
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
class _Known:
    until: float
    """By the monotonic clock."""
    outcome: Subject | Unauthenticated


class TokenReviewer:
    """Asks the API server, and remembers its answers for a while."""

    def __init__(self, client: ApiClient, audience: str, node: str | None) -> None:
        """`client` is this object's to close; `node` is Kubernetes' name of this node where tokens that are bound to
        pods of others are refused."""
        self._client = client
        self._audience = audience
        self._node = node
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Subject]] = {}

    async def close(self) -> None:
        """End the connections."""
        for task in self._asking.values():
            task.cancel()
        await self._client.close()

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
        except (binascii.Error, ValueError, RecursionError):
            raise Unauthenticated("The token is no JSON Web Token, as those of service accounts are.") from None
        if self._audience not in ([claims.aud] if isinstance(claims.aud, str) else claims.aud):
            raise self._other_audience()
        if claims.exp <= time.time():
            raise Unauthenticated("The token has expired. Read the file again that it is in: it is renewed there.")
        return claims.exp

    def _other_audience(self) -> Unauthenticated:
        return Unauthenticated(
            f"The token was not issued for the audience {self._audience!r}. Project one into the pod with that "
            "audience (serviceAccountToken.audience).",
            audience=self._audience,
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
        if self._audience not in status.audiences:
            return self._other_audience()
        found = _ACCOUNT.fullmatch(status.user.username)
        if found is None:
            return Unauthenticated("The token is not of a service account, and no other counts here.")
        nodes = status.user.extra.get(_NODE_NAME, [])
        if self._node and nodes and nodes != [self._node]:
            return Unauthenticated(
                f"The token is bound to a pod of the Kubernetes node {nodes[0][:80]}, and this daemon serves those of "
                f"{self._node}. Connect to the daemon of the pod's own node.",
                node=nodes[0][:80],
            )
        return Subject(f"kubernetes:{found[1]}/{found[2]}")

    async def _ask(self, token: str) -> _Status:
        """Raises AuthorityUnreachable."""
        spec = {"token": token, "audiences": [self._audience]}
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        try:
            status, body = await self._client.call("POST", "/apis/authentication.k8s.io/v1/tokenreviews", review)
        except ApiCallError as error:
            raise self._unreachable(str(error)) from None
        if status not in (200, 201):
            raise self._unreachable(f"it answered {status}")
        try:
            return msgspec.json.decode(body, type=_Review).status
        except msgspec.MsgspecError:
            raise self._unreachable("its answer is no TokenReview") from None

    def _unreachable(self, cause: str) -> AuthorityUnreachable:
        return AuthorityUnreachable(
            f"The Kubernetes API server at {self._client.url} did not review the token ({cause}). Try again; check "
            "kubernetes.api_server and its ca, and that the daemon's own token may create TokenReviews.",
            server=self._client.url,
        )


def _granted(outcome: Subject | Unauthenticated) -> Subject:
    """Raises Unauthenticated."""
    if isinstance(outcome, Unauthenticated):
        raise outcome.again()
    return outcome
