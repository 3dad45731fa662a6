"""Tries a certificate, its key and the authorities before they count: in a TLS handshake of both ends, in memory.

Rules of this file:

* The handshake is the real one of the TLS library, so that what passes here passes with others: the key fits, the chain
  leads to an authority, the time is right, and the certificate may be used by servers and by clients.
* A key is handed to the library by a memory file that nobody else can open, and never written to a disk.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from typing import Any

from peermem.core.spiffe import is_spiffe_id


class BadPair(Exception):
    """A certificate, key or authority that can't be put in force; the text says why, and ends without a period."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What a daemon shows, and whom it believes: PEM."""

    certificate: bytes = field(repr=False)
    """The certificate, then those between it and an authority."""
    key: bytes = field(repr=False)
    roots: bytes = field(repr=False)
    """Authorities."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A certificate as the other end sees it."""

    pem: bytes = field(repr=False)
    spiffe_id: str
    """Empty where it has none, or more than one."""
    fingerprint: str
    """sha256: and the digest of the certificate."""
    name: str
    """A name that it is issued to, which gRPC insists on: DNS, IP address, or common name; empty for none."""
    not_after: str
    """As the TLS library writes it."""


def context_of(pair: Pair, side: ssl._SSLMethod) -> ssl.SSLContext:
    """Return a context that shows the pair and asks the other end for a certificate. Raises BadPair."""
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # whose certificate it is, its SPIFFE ID says
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    _load_roots(context, pair.roots)
    fd = os.memfd_create("peermem-pair", os.MFD_CLOEXEC)
    try:
        os.write(fd, pair.certificate + b"\n" + pair.key)
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise BadPair(f"certificate and key are no pair in PEM form ({_cause(error)})") from None
    finally:
        os.close(fd)
    return context


def _no_password() -> str:
    raise ValueError("the key is locked with a password")


def _load_roots(context: ssl.SSLContext, roots: bytes) -> None:
    try:
        context.load_verify_locations(cadata=roots.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise BadPair(f"the authorities are no certificates in PEM form ({_cause(error)})") from None


def authorities_end(pair: Pair) -> float | None:
    """Return when the first of a pair's authorities ends, in seconds since 1970; None where none says.

    Raises BadPair.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load_roots(context, pair.roots)
    return min((ssl.cert_time_to_seconds(str(each["notAfter"])) for each in context.get_ca_certs()), default=None)


def try_pair(pair: Pair) -> Shown:
    """Return what others see of the pair's certificate. Raises BadPair."""
    client = _End(context_of(pair, ssl.PROTOCOL_TLS_CLIENT), server=False)
    server = _End(context_of(pair, ssl.PROTOCOL_TLS_SERVER), server=True)
    for _ in range(_TURNS):
        done = [end.turn(other) for end, other in ((client, server), (server, client))]
        if all(done):
            return shown_by(client.connection)
    raise BadPair("its handshake does not end")


_TURNS = 16


class _End:
    def __init__(self, context: ssl.SSLContext, *, server: bool) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.connection = context.wrap_bio(self.incoming, self.outgoing, server_side=server)

    def turn(self, other: _End) -> bool:
        """Go on with the handshake; return whether this end is through."""
        try:
            self.connection.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise BadPair(f"its own handshake fails ({_cause(error)})") from None
        finally:
            other.incoming.write(self.outgoing.read())
        return True


def shown_by(connection: ssl.SSLObject | ssl.SSLSocket) -> Shown:
    """Return the certificate of the other end of a connection whose handshake has ended."""
    facts: dict[str, Any] = connection.getpeercert() or {}
    der = connection.getpeercert(binary_form=True) or b""
    names = facts.get("subjectAltName", ())
    ids = [value for kind, value in names if kind == "URI" and value.startswith("spiffe:")]
    common = [value for part in facts.get("subject", ()) for kind, value in part if kind == "commonName"]
    hosts = [value for kind, value in names if kind == "DNS" and not value.startswith("*")]
    hosts += [_ip_name(value) for kind, value in names if kind == "IP Address"]
    return Shown(
        ssl.DER_cert_to_PEM_cert(der).encode(),
        ids[0] if len(ids) == 1 and is_spiffe_id(ids[0]) else "",
        fingerprint_of(der),
        (hosts or common or [""])[0],
        str(facts.get("notAfter", "")),
    )


def _ip_name(text: str) -> str:
    address = ipaddress.ip_address(text.strip())
    return f"[{address}]" if address.version == 6 else str(address)


def fingerprint_of(der: bytes) -> str:
    """Return what a certificate is denied by."""
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def _cause(error: Exception) -> str:
    return getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)
