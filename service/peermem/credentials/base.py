"""The certificate that this daemon shows, the authorities that it believes, and the certificates that count no more.

Rules of this file:

* What is in force has been tried: certificate, key and authorities fit together, are valid now, and name this node.
  What does not pass is refused, and what was in force before stays so.
* Read from any thread; replaced as a whole, so that nobody sees half of it.
* A key is in no repr and no log.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from peermem.core.spiffe import Denied, NodePattern
from peermem.credentials.trial import BadPair, Pair, Shown, authorities_end, try_pair

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class InForce:
    """One state of the credentials."""

    pair: Pair
    shown: Shown
    """What others see of the certificate."""
    generation: int
    """Grows with each new pair."""
    authorities_end: float | None
    """When the first of them ends, in seconds since 1970."""
    denied: Denied = field(default_factory=Denied)


class Credentials:
    """What is in force now."""

    def __init__(self, node: str, pattern: NodePattern, pair: Pair, denied: Denied) -> None:
        """`pair` is the first one of this `node`. Raises BadPair."""
        self.pattern = pattern
        self._expected = pattern.spiffe_id(node)
        self.now = InForce(pair, self._tried(pair), 1, authorities_end(pair), denied)

    def _tried(self, pair: Pair) -> Shown:
        shown = try_pair(pair)
        if shown.spiffe_id != self._expected:
            raise BadPair(f"its SPIFFE ID is {shown.spiffe_id or 'missing'}, and this node's is {self._expected}")
        if not shown.name:
            raise BadPair("it has no DNS name, IP address or common name, of which gRPC needs one, whichever it is")
        return shown

    def offer(self, pair: Pair) -> None:
        """Put a new pair in force, for connections from now on. Raises BadPair, and leaves the old one in force."""
        if pair == self.now.pair:
            return
        shown = self._tried(pair)
        self.now = InForce(pair, shown, self.now.generation + 1, authorities_end(pair), self.now.denied)
        log.info("certificate_in_force", spiffe_id=shown.spiffe_id, until=shown.not_after)

    def problem(self) -> str:
        """Return why nobody can connect any more, as a sentence; empty where they can."""
        shown = self.now.shown
        if time.time() < ssl.cert_time_to_seconds(shown.not_after):
            return ""
        return f"The certificate of {shown.spiffe_id} ended {shown.not_after}. Renew it."

    def ends(self) -> tuple[float, float | None]:
        """Return when the certificate ends, in seconds since 1970, and the first of the authorities'; None where none
        says."""
        return ssl.cert_time_to_seconds(self.now.shown.not_after), self.now.authorities_end

    def refused(self, cause: str) -> None:
        """Say that newer ones can't be put in force."""
        log.error("certificate_refused", cause=cause, kept=f"the one that ends {self.now.shown.not_after}")

    def deny(self, denied: Denied) -> None:
        """Put a new list of what is denied in force."""
        if denied != self.now.denied:
            self.now = replace(self.now, denied=denied)
            log.info("denied_in_force", entries=len(denied.entries))


class Source(Protocol):
    """Where credentials come from, and where newer ones do."""

    async def first(self) -> Pair:
        """Return what there is now. Raises BadPair, OSError."""

    async def follow(self, credentials: Credentials) -> None:
        """Offer newer ones for as long as the daemon runs."""

    def close(self) -> None:
        """Let go of what it comes from."""
