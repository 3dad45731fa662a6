"""Whom the daemon believes: TLS and Kubernetes tokens.

Rules of this file:

* Files are named here and read elsewhere, again and again: others renew them.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from peermem.config_values import FilePath, HttpsUrl, KubernetesNode, NodeIds, SocketPath, TokenAudience
from peermem.strict_toml import Contradiction


class Tls(Struct, frozen=True, forbid_unknown_fields=True):
    """TLS of gRPC over TCP: on as soon as a certificate or the SPIFFE Workload API is named."""

    certificate: FilePath | None = None
    """PEM: this node's certificate, then those between it and an authority."""
    key: FilePath | None = None
    """PEM: its key, without a password."""
    ca: FilePath | None = None
    """PEM: the authorities that are believed."""
    workload_api: SocketPath | None = None
    """The SPIFFE Workload API, instead of the three files."""
    nodes: NodeIds | None = None
    """SPIFFE ID of each node's certificate."""
    denied: FilePath | None = None
    """SPIFFE IDs and fingerprints of certificates that count no more."""
    anonymous: bool = False
    """Let in who shows nothing at grpc.token_address."""

    @property
    def on(self) -> bool:
        """Whether gRPC over TCP is TLS."""
        return bool(self.certificate or self.key or self.ca or self.workload_api)


class Kubernetes(Struct, frozen=True, forbid_unknown_fields=True):
    """Tokens of service accounts, which the API server reviews: on as soon as it is named."""

    api_server: HttpsUrl | None = None
    """Such as https://kubernetes.default.svc."""
    ca: FilePath = FilePath("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
    """PEM: the authorities that sign the API server's certificate."""
    token: FilePath = FilePath("/var/run/secrets/kubernetes.io/serviceaccount/token")
    """The daemon's own token, which may create TokenReviews."""
    audience: TokenAudience = TokenAudience("peermem")
    """What a token must be issued for."""
    this_node_only: KubernetesNode | None = None
    """Kubernetes' name of this node: a token that is bound to a pod of another node is refused; None: it is not."""
    publish_as: KubernetesNode | None = None
    """Kubernetes' name of this node, as whose ResourceSlice its devices are published; None: they are not."""


def trust_contradictions(tls: Tls, kubernetes: Kubernetes, token_address: str | None) -> Iterator[Contradiction]:
    """Yield what is wrong between values that are valid one by one."""
    files = {"certificate": tls.certificate, "key": tls.key, "ca": tls.ca}
    missing = [name for name, path in files.items() if not path]
    if tls.workload_api and len(missing) < len(files):
        yield (
            "tls.workload_api",
            "tls.workload_api is set beside files that it stands for. Leave either the one or the others.",
        )
    if not tls.workload_api and 0 < len(missing) < len(files):
        key = f"tls.{missing[0]}"
        yield key, f"{key} is missing. tls.certificate, tls.key and tls.ca are needed together."
    if tls.on and not tls.nodes:
        yield "tls.nodes", "tls.nodes is empty, so that no node could be told from others. Set it to their SPIFFE IDs."
    if token_address and not tls.on:
        yield "grpc.token_address", "grpc.token_address needs TLS, or tokens could be read on their way. Set tls."
    if token_address and not kubernetes.api_server and not tls.anonymous:
        yield (
            "grpc.token_address",
            "grpc.token_address is of no use while no token counts. Set kubernetes.api_server, or leave it out.",
        )
    if kubernetes.publish_as and not kubernetes.api_server:
        yield (
            "kubernetes.publish_as",
            "kubernetes.publish_as is of no use while kubernetes.api_server is empty. Set that, or leave it out.",
        )
    if tls.anonymous and not token_address:
        yield (
            "tls.anonymous",
            "tls.anonymous lets in who shows nothing, at grpc.token_address, which is empty. Set that, too.",
        )
