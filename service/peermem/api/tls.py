"""TLS of the gRPC server.

Rules of this file:

* Each handshake uses the credentials in force; connections that there are go on with those that they began with.
* gRPC asks from threads of its own: what is read here is one frozen value.
"""

from __future__ import annotations

import grpc

from peermem.credentials.base import Credentials, InForce


def server_credentials(credentials: Credentials, *, asks: bool) -> grpc.ServerCredentials:
    """Return what a port serves TLS with; where it `asks`, only callers whose certificate is believed get in."""
    first = credentials.now
    told = first.generation

    def newer() -> grpc.ServerCertificateConfiguration | None:
        nonlocal told
        now = credentials.now
        if now.generation == told:
            return None  # go on with the last one
        told = now.generation
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(first),
        newer,  # type: ignore[arg-type]  # grpc's stubs leave None out
        require_client_authentication=asks,
    )


def _configuration(now: InForce) -> grpc.ServerCertificateConfiguration:
    pair = now.pair
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], root_certificates=pair.roots)
