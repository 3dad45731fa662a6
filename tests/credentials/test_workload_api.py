"""Credentials from a SPIFFE Workload API: the real package, and a small agent on a unix socket."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from spiffe._proto import workload_pb2, workload_pb2_grpc
from structlog.testing import capture_logs

from peermem.core.spiffe import Denied, NodePattern
from peermem.credentials.base import Credentials
from peermem.credentials.trial import BadPair, Pair, try_pair
from peermem.credentials.workload_api import WorkloadApi
from tests.certificates import PATTERN, Authority, Certificate
from tests.descriptors import until

AUTHORITY = Authority()
ID = PATTERN.format(node="a")


class Agent(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """Streams the certificates that it is given."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._current: tuple[Certificate, ...] = ()
        self._over = False

    def give(self, *certificates: Certificate) -> None:
        with self._changed:
            self._current = certificates
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def FetchX509SVID(
        self, request: workload_pb2.X509SVIDRequest, context: grpc.ServicerContext
    ) -> Iterator[workload_pb2.X509SVIDResponse]:
        told: tuple[Certificate, ...] = ()
        while True:
            with self._changed:
                self._changed.wait_for(lambda told=told: self._over or self._current != told)  # type: ignore[misc]
                if self._over:
                    context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
                told = self._current
            yield workload_pb2.X509SVIDResponse(svids=[svid(each) for each in told])


def svid(certificate: Certificate) -> workload_pb2.X509SVID:
    parsed = x509.load_pem_x509_certificate(certificate.pem)
    key = serialization.load_pem_private_key(certificate.key, None)
    return workload_pb2.X509SVID(
        spiffe_id=parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.UniformResourceIdentifier
        )[0],
        x509_svid=parsed.public_bytes(serialization.Encoding.DER),
        x509_svid_key=key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        bundle=certificate.authority.certificate.public_bytes(serialization.Encoding.DER),
    )


@contextmanager
def serving(agent: Agent, path: Path) -> Iterator[None]:
    server = grpc.server(ThreadPoolExecutor(4))
    workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(agent, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield
    finally:
        agent.end()
        server.stop(None).wait()


def same(pair: Pair, certificate: Certificate) -> bool:
    return try_pair(pair).fingerprint == certificate.fingerprint


async def test_certificates_come_from_the_agent_and_so_do_newer_ones(tmp_path: Path) -> None:
    path, agent = tmp_path / "agent.sock", Agent()
    first, newer, newest = (AUTHORITY.node("a") for _ in range(3))
    source = WorkloadApi(str(path), ID, retry=0.05)
    with serving(agent, path):
        agent.give(AUTHORITY.node("z"), first)
        credentials = Credentials("a", NodePattern(PATTERN), await source.first(), Denied())
        assert same(credentials.now.pair, first), "of several, the one that is this node's"
        with capture_logs() as logs:
            following = asyncio.create_task(source.follow(credentials))
            agent.give(newer)
            await until(lambda: same(credentials.now.pair, newer))
            agent.give(AUTHORITY.node("z"))
            await until(lambda: any(line["event"] == "certificate_refused" for line in logs))
            assert same(credentials.now.pair, newer)
    again = Agent()
    with serving(again, path):
        again.give(newest)
        await until(lambda: same(credentials.now.pair, newest))
    following.cancel()
    await asyncio.wait([following])
    source.close()


async def test_an_agent_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.sock", Path("/proc/none.sock")):
        with pytest.raises(BadPair, match="gives no certificate"):
            await WorkloadApi(str(path), ID, patience=0.2).first()


async def test_the_package_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spiffe", None)
    with pytest.raises(BadPair, match=r"comes with peermem\[spiffe\]"):
        await WorkloadApi("/run/none.sock", ID).first()
