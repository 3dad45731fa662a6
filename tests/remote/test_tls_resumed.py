"""A TLS session that is resumed: the library does not look at the certificate again, so that it may be over by now."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

from peermem.credentials.trial import context_of
from tests.certificates import Authority
from tests.descriptors import until
from tests.trusting import Node, nodes

AUTHORITY = Authority()
JOB = AUTHORITY.issue("spiffe://example.org/job/7")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, DATA, SETTINGS = 1, 0, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def text(value: str) -> bytes:
    return bytes((len(value),)) + value.encode()


def get_node() -> bytes:
    """Return the bytes of a call of GetNode (RFC 9113, RFC 7541): gRPC for Python resumes no sessions by itself."""
    headers = b"\x83\x87"  # :method POST, :scheme https
    headers += b"\x04" + text("/peermem.v1.NodeService/GetNode") + b"\x01" + text("peermem.test")
    headers += b"\x0f\x10" + text("application/grpc") + b"\x00" + text("te") + text("trailers")
    call = frame(HEADERS, 4, 1, headers) + frame(DATA, 1, 1, bytes(5))
    return PREFACE + frame(SETTINGS, 0, 0) + call


def call(node: Node, context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSocket:
    host, _, port = node.address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=20)
    connection = context.wrap_socket(plain, server_hostname="peermem.test", session=session)
    connection.sendall(get_node())
    connection.recv(1)  # with it, a session comes that could be resumed
    return connection


async def test_what_a_resumed_session_asks_is_refused(tmp_path: Path) -> None:
    context = context_of(JOB.pair, ssl.PROTOCOL_TLS_CLIENT)
    async with nodes(tmp_path, ("a",), AUTHORITY) as (a,):
        assert a.app is not None
        metrics = a.app.metrics

        def answered(code: str) -> bool:
            count = 'grpc_method="GetNode",grpc_service="peermem.v1.NodeService",grpc_type="unary"} 1.0'
            page = metrics.render()[0].decode()
            return any(f'grpc_code="{code}"' in line and line.endswith(count) for line in page.splitlines())

        with await asyncio.to_thread(call, a, context, None) as first:
            await until(lambda: answered("OK"))
            session = first.session
        with await asyncio.to_thread(call, a, context, session) as resumed:
            assert resumed.session_reused
            await until(lambda: answered("UNAUTHENTICATED"))
