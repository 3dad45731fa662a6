"""Credentials from the SPIFFE Workload API, such as SPIRE's agent serves: they are made and renewed there.

Rules of this file:

* The package `spiffe` is imported when the configuration names a socket, and only then.
* Only the authorities of the certificate's own trust domain are believed: those of others could sign for it.
* An agent that goes away changes nothing; it is sought again for as long as the daemon runs.
* A channel to it is never closed by hand, because the package's threads may be about to make a call on it, which ends
  the process: each attempt has one of its own, which goes when its threads have ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peermem.credentials.base import Credentials, Source
from peermem.credentials.trial import BadPair, Pair

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from cryptography.x509 import Certificate
    from spiffe import X509Source, X509Svid


@dataclass(slots=True)
class WorkloadApi:
    """The agent at a unix socket."""

    socket: str
    spiffe_id: str
    """Of this node: which of several certificates is meant."""
    retry: float = 5.0
    """Seconds between two attempts to reach an agent that went away."""
    patience: float = 10.0
    """Seconds for its first answer."""
    _agent: X509Source | None = field(default=None, repr=False)
    _news: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    async def first(self) -> Pair:
        """See Source."""
        agent = await asyncio.to_thread(self._connect, asyncio.get_running_loop())
        self._agent = agent
        return self._pair(agent)

    async def follow(self, credentials: Credentials) -> None:
        """See Source."""
        while True:
            self._news.clear()
            try:
                agent = self._agent
                if agent is None or agent.is_closed():
                    credentials.offer(await self.first())
                else:
                    credentials.offer(self._pair(agent))
            except BadPair as error:
                credentials.refused(str(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(self.retry):
                    await self._news.wait()

    def close(self) -> None:
        """See Source."""
        if self._agent is not None:
            self._agent.close()

    def _connect(self, loop: asyncio.AbstractEventLoop) -> X509Source:
        """Return the agent's source of certificates, which sets `_news` when there are new ones. Raises BadPair."""

        def told() -> None:
            loop.call_soon_threadsafe(self._news.set)

        try:
            from spiffe import WorkloadApiClient, X509Source
            from spiffe.errors import PySpiffeError
        except ImportError:
            raise BadPair("the Python package spiffe is missing, which comes with peermem[spiffe]") from None
        try:
            client = WorkloadApiClient(f"unix://{self.socket}")
            agent = X509Source(client, timeout_in_seconds=self.patience, svid_picker=self._mine)
        except (PySpiffeError, OSError) as error:
            raise BadPair(f"the SPIFFE Workload API at {self.socket} gives no certificate ({error})") from None
        agent.subscribe_for_updates(told)
        return agent

    def _mine(self, svids: list[X509Svid]) -> X509Svid:
        return next((each for each in svids if str(each.spiffe_id) == self.spiffe_id), svids[0])

    def _pair(self, agent: X509Source) -> Pair:
        """Raises BadPair."""
        from spiffe.errors import PySpiffeError

        try:
            context = agent.get_x509_context()
        except PySpiffeError as error:
            raise BadPair(f"the SPIFFE Workload API at {self.socket} broke off ({error})") from None
        svid = context.default_svid
        bundle = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        authorities = bundle.x509_authorities if bundle is not None else ()
        return Pair(_pem(svid.cert_chain), _key(svid.private_key), _pem(authorities))


def _pem(certificates: Iterable[Certificate]) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def _key(key: PrivateKeyTypes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


if TYPE_CHECKING:
    _: type[Source] = WorkloadApi
