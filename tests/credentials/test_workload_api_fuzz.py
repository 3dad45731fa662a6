"""Whatever an agent of the SPIFFE Workload API answers: certificates that can be tried, or a reason."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spiffe._proto import workload_pb2

from peermem.core.spiffe import Denied, NodePattern
from peermem.credentials.base import Credentials
from peermem.credentials.trial import BadPair
from peermem.credentials.workload_api import WorkloadApi
from tests.certificates import PATTERN
from tests.credentials.test_certificates_fuzz import AUTHORITY, GOOD, changed
from tests.credentials.test_workload_api import ID, svid
from tests.fuzzing import fuzz, tried

WHOLE = workload_pb2.X509SVIDResponse(svids=[svid(GOOD), svid(AUTHORITY.node("z"))])


@dataclass
class RawAgent:
    """Answers each call with bytes, whatever they are."""

    path: Path
    answer: bytes = field(default=b"")

    def serve(self) -> grpc.Server:
        def fetch(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            yield self.answer

        method: Any = grpc.unary_stream_rpc_method_handler(fetch)
        server = grpc.server(ThreadPoolExecutor(4))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("SpiffeWorkloadAPI", {"FetchX509SVID": method}),)
        )
        server.add_insecure_port(f"unix:{self.path}")
        server.start()
        return server


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawAgent]:
    agent = RawAgent(tmp_path_factory.mktemp("agent") / "agent.sock")
    server = agent.serve()
    yield agent
    server.stop(None).wait()


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Answers with some field changed, and bytes that are none."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed(WHOLE.SerializeToString()))
    answer = workload_pb2.X509SVIDResponse()
    answer.CopyFrom(WHOLE)
    name = draw(st.sampled_from(("spiffe_id", "x509_svid", "x509_svid_key", "bundle")))
    for each in answer.svids if draw(st.booleans()) else answer.svids[:1]:
        value = getattr(each, name)
        if isinstance(value, str):
            setattr(each, name, draw(st.one_of(st.text(max_size=20), st.sampled_from(("spiffe://", ID + "/", "x")))))
        else:
            setattr(each, name, draw(st.one_of(changed(value), st.binary(max_size=20))))
    return answer.SerializeToString()


@fuzz(8)
@given(answer=answers())
def test_any_answer_of_an_agent_is_a_pair_or_a_reason(agent: RawAgent, answer: bytes) -> None:
    tried("Workload API answers")
    agent.answer = answer
    asyncio.run(offer(agent.path))


async def offer(path: Path) -> None:
    credentials = Credentials("a", NodePattern(PATTERN), GOOD.pair, Denied())
    source = WorkloadApi(str(path), ID, patience=0.3)
    try:
        credentials.offer(await source.first())
    except BadPair:
        assert credentials.now.pair == GOOD.pair
    finally:
        source.close()
    assert credentials.now.shown.spiffe_id == ID
