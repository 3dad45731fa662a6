"""Who is calling: the subject that owns what a call makes and that the policy is asked about.

Rules of this file:

* On the unix socket, a call that carries a session of the attach socket is the session's subject: its user, because the
  kernel said so, or the service account whose token began it. A session counts nowhere else, and only while it lasts.
* A token of Kubernetes is the service account that the API server says it is, on the unix socket and over TLS.
* Over TLS, a certificate is its SPIFFE ID. Only one that is a node's lets its caller be that node: use LinkService, and
  speak of the clients that this node identified itself, as "SUBJECT[,GROUP...]@NODE".
* What a node asks on the rails of its link carries no certificate: a call about the link vouches for it, for a while
  and only as long as the certificate is not denied.
* Everybody else is "anonymous"; over TLS that is refused, unless the configuration says otherwise.
* Over plain TCP nothing is proved, so that a node and its clients are who they say they are; see SECURITY.md.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from peermem.api.calls import Context
from peermem.broker.accepted import Voucher
from peermem.broker.sessions import Session, SessionTable
from peermem.core.errors import AccessDenied, InvalidField, Unauthenticated
from peermem.core.identity import ANONYMOUS, Subject
from peermem.core.spiffe import is_spiffe_id
from peermem.credentials.base import Credentials
from peermem.credentials.trial import fingerprint_of
from peermem.telemetry import audit

SESSION_KEY = "peermem-session"
ON_BEHALF_KEY = "peermem-on-behalf-of"
TOKEN_KEY = "authorization"
_KEYS = frozenset({SESSION_KEY, ON_BEHALF_KEY, TOKEN_KEY})
_TOKEN_PREFIX = "bearer "
_FOR_ALL = frozenset({("grpc.health.v1.Health", "Check")})
"""Calls that need no identity: they tell at once whether the daemon serves, and nothing else."""

VOUCHED_FOR = 600.0
"""Seconds for which a certificate that a node showed counts for what it asks on its link's rails."""

ReviewToken = Callable[[str], Awaitable[Subject]]
"""Returns whose token it is. Raises Unauthenticated, AuthorityUnreachable, LimitReached."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What a caller may show."""

    credentials: Credentials | None = None
    """None where TCP is plain."""
    review_token: ReviewToken | None = None
    """None where tokens don't count."""
    anonymous: bool = False
    """Whether who shows nothing over TLS is let in."""

    async def token_subject(self, token: str) -> Subject:
        """Return whose token it is. Raises Unauthenticated, AuthorityUnreachable, LimitReached."""
        if self.review_token is None:
            raise Unauthenticated("Tokens don't count on this node: its configuration has no [kubernetes] table.")
        return await self.review_token(token)


class Identity:
    """Finds the subject of calls."""

    def __init__(self, sessions: SessionTable, trust: Trust) -> None:
        self._sessions = sessions
        self._trust = trust

    async def admit(self, service: str, method: str, context: Context) -> None:
        """Return where the caller may ask this at all. Raises as `subject`."""
        open_to_all = self._trust.credentials is None or (service, method) in _FOR_ALL or _is_local(context)
        if not open_to_all:
            await self.subject(context)

    def session(self, context: Context) -> Session | None:
        """Return the session that the call carries, if any. Raises SessionNotFound, Unauthenticated."""
        token = _told(context).get(SESSION_KEY)
        return self._session(token, context) if token is not None else None

    def _session(self, token: str, context: Context) -> Session:
        if not _is_local(context):
            raise Unauthenticated(
                "A session of the attach socket counts only on the unix socket of its daemon. Connect to unix:///PATH."
            )
        return self._sessions.find(token)

    def relayed(self, context: Context) -> bool:
        """Whether another daemon hands on what a client asked it for."""
        return ON_BEHALF_KEY in _told(context)

    async def subject(self, context: Context) -> Subject:
        """Return who is calling. Raises SessionNotFound, InvalidField, Unauthenticated, AccessDenied,
        AuthorityUnreachable, LimitReached."""
        told = _told(context)
        if ON_BEHALF_KEY in told:
            return self._client_of(self.node(context), spoken_subject(told[ON_BEHALF_KEY], ON_BEHALF_KEY))
        if SESSION_KEY in told:
            session = self._session(told[SESSION_KEY], context)
            audit.of_process(session.pid, session.origin)
            return session.subject
        if TOKEN_KEY in told:
            return await self._token_subject(told[TOKEN_KEY], context)
        spiffe_id = self._certified(context)
        if spiffe_id:
            return Subject(spiffe_id)
        if self._trust.credentials is not None and not self._trust.anonymous and not _is_local(context):
            raise Unauthenticated(
                "The call shows neither a certificate nor a token, so that it is not known whose it is. Connect with a "
                "certificate to grpc.address, or show a token."
            )
        return ANONYMOUS

    def node(self, context: Context) -> str:
        """Return the short name of the node whose daemon calls; empty where TCP is plain, so that it can't be known.

        Raises AccessDenied, Unauthenticated.
        """
        if _is_local(context):
            raise AccessDenied("Only other nodes' daemons may ask this, over TCP; the unix socket is for local jobs.")
        credentials = self._trust.credentials
        if credentials is None:
            return ""
        spiffe_id = self._certified(context)
        node = credentials.pattern.node(spiffe_id)
        if node is None:
            raise AccessDenied(
                f"Only other nodes' daemons may ask this, and {spiffe_id or 'a caller without a certificate'} is none. "
                "Give it a certificate with the SPIFFE ID that tls.nodes says, if it is one.",
                subject=spiffe_id,
            )
        return node

    def voucher(self, context: Context) -> Voucher:
        """Return what vouches for the node that calls, for a while after the call. Raises as `node`."""
        self.node(context)
        credentials, until = self._trust.credentials, time.monotonic() + VOUCHED_FOR
        certificate = b"".join(context.auth_context().get("x509_pem_cert", ())) if credentials is not None else b""
        spiffe_id = self._certified(context)

        def check() -> None:
            if time.monotonic() > until:
                raise Unauthenticated(
                    f"The node showed its certificate more than {VOUCHED_FOR:g} s ago. Ask by a call, with it."
                )
            if credentials is not None and _is_denied(credentials, spiffe_id, certificate):
                raise AccessDenied(
                    f"The certificate of {spiffe_id}, which opened the link, counts no more: the list of tls.denied "
                    "names it.",
                    subject=spiffe_id,
                )

        return check

    def _client_of(self, node: str, subject: Subject) -> Subject:
        if node and subject.node != node:
            raise AccessDenied(
                f"nodes/{node} speaks of {subject}, a client of nodes/{subject.node}, not its own.",
                node=node,
                subject=subject,
            )
        return subject

    async def _token_subject(self, token: str, context: Context) -> Subject:
        if self._trust.credentials is None and not _is_local(context):
            raise Unauthenticated(
                "The token came over a plain connection, where others can read it: it does not count, and should be "
                "replaced. Use TLS, or the unix socket."
            )
        if not token.lower().startswith(_TOKEN_PREFIX):
            raise Unauthenticated("The metadata key authorization must hold `Bearer` and a token.")
        return await self._trust.token_subject(token[len(_TOKEN_PREFIX) :].strip())

    def _certified(self, context: Context) -> str:
        """Return the SPIFFE ID of the caller's certificate; empty where it shows none. Raises Unauthenticated."""
        credentials = self._trust.credentials
        if credentials is None or _is_local(context):
            return ""
        shown = context.auth_context()
        certificate = b"".join(shown.get("x509_pem_cert", ()))
        if not certificate:
            return ""
        if b"true" in shown.get("ssl_session_reused", ()):
            raise Unauthenticated(
                "The connection resumes an earlier TLS session, so that the caller's certificate was not looked at "
                "again and may be over by now. Connect without resuming one."
            )
        ids = [each.decode("ascii", "replace") for each in shown.get("peer_spiffe_id", ())]
        if len(ids) != 1 or not is_spiffe_id(ids[0]):
            raise Unauthenticated(
                "The caller's certificate has no SPIFFE ID, more than one, or one of more than 300 characters. Have "
                "one issued with a single URI such as spiffe://example.org/job/7."
            )
        if _is_denied(credentials, ids[0], certificate):
            raise Unauthenticated(
                f"The certificate of {ids[0]} counts no more: the list of tls.denied names it.", subject=ids[0]
            )
        return ids[0]


def _is_denied(credentials: Credentials, spiffe_id: str, certificate: bytes) -> bool:
    """Whether a certificate (PEM) that was good counts no more."""
    denied = credentials.now.denied
    return bool(denied.entries) and denied.holds(
        spiffe_id, fingerprint_of(ssl.PEM_cert_to_DER_cert(certificate.decode()))
    )


def spoken_subject(claimed: str, field: str) -> Subject:
    """Return the subject that another daemon acts for. Raises InvalidField."""
    try:
        return Subject.parse_spoken(claimed)
    except ValueError as error:
        raise InvalidField(f"{field} {error}.", field=field) from None


def _is_local(context: Context) -> bool:
    return context.peer().startswith("unix:")


def _told(context: Context) -> dict[str, str]:
    """Return what the caller says of itself; an empty value is none."""
    return {
        key: value if isinstance(value, str) else value.decode("ascii", "replace")
        for key, value in context.invocation_metadata() or ()
        if key in _KEYS and value
    }
