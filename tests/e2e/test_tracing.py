"""Traces across a job and three real daemons, as a collector gets them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from bench.daemons import Daemon, daemons
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import peermem
from peermem.v1 import transfer_pb2, transfer_pb2_grpc
from tests.collector import Collector, Seen, collecting, tree
from tests.e2e.conftest import DEVICE
from tests.e2e.support import MIB

SOURCE = Path(__file__).parents[2] / "service"
JOB = """
import sys
target, home, endpoint, source, destination = sys.argv[1:]
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint, insecure=True)))
trace.set_tracer_provider(provider)
import peermem
with (
    peermem.connect(target) as node,
    peermem.connect(home) as owner,
    trace.get_tracer("job").start_as_current_span("step"),
):
    try:
        node.transfer(owner.region(source), destination).wait()
    except peermem.PeermemError as error:
        print(error.reason)
provider.shutdown()
"""
QUIET = """
import sys
import peermem
with peermem.connect(sys.argv[1]) as node:
    one = node.create_region(device="bar0", length=4096)
    two = node.create_region(device="bar0", length=4096)
    node.transfer(one, two).wait()
import peermem.app
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


@dataclass
class Traced:
    nodes: dict[str, Daemon]
    collector: Collector
    endpoint: str

    def job(self, node: str, source: str, destination: str) -> str:
        """Run a job that is traced and asks a node for a transfer of a region of node a; return what it prints."""
        targets = self.nodes[node].target, self.nodes["a"].target
        return run([sys.executable, "-c", JOB, *targets, self.endpoint, source, destination])

    def trace(self, destination: str) -> list[Seen]:
        """Return the spans of the trace of a transfer to a region, when the job's last one is there."""
        steps: list[Seen] = []

        def is_whole(spans: list[Seen]) -> bool:
            mine = [span for span in spans if span.attributes.get("peermem.destination") == destination]
            steps[:] = [span for span in spans if mine and span.trace == mine[0].trace]
            return {"step", "transfer", "peermem.transfer"} <= {span.name for span in steps} and all(
                any(other.id == span.parent for other in steps) for span in steps if span.name != "step"
            )

        self.collector.until(is_whole)
        return steps


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(SOURCE)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    with collecting() as (collector, endpoint):
        environ = {
            "PEERMEM_TRACING_ENDPOINT": endpoint,
            "PEERMEM_TRACING_SAMPLE": "0.0",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "PEERMEM_TRANSFER_RETRY_FOR": "0s",
        }
        folder = tmp_path_factory.mktemp("traced")
        environ["PEERMEM_STORAGE_DIRECTORIES"] = f'[{{path = "{folder}"}}]'
        with daemons(folder, ("a", "b", "c"), DEVICE, environ) as nodes:
            yield Traced(nodes, collector, endpoint)


def test_a_relayed_transfer_is_one_tree_of_a_job_and_three_daemons(traced: Traced) -> None:
    with peermem.connect(traced.nodes["a"].target) as a, peermem.connect(traced.nodes["b"].target) as b:
        source = a.create_region(device="bar0", length=64 * MIB, name="source")
        target = b.create_region(device="bar0", length=64 * MIB, name="target")
        assert traced.job("c", source.name, target.name) == ""
        spans = traced.trace(target.name)
        run_there = "job:step > job:peermem.transfer > c:transfer > a:transfer"
        wanted = [f"{run_there} > a:leg > a:{part}" for part in ("grant.acquire", "grant.acquire > b:grant", "slice")]
        traced.collector.until(lambda _: set(wanted) <= set(tree(traced.trace(target.name))))
        spans = traced.trace(target.name)
        assert set(tree(spans)) == {
            "job:step",
            "job:step > job:peermem.transfer",
            "job:step > job:peermem.transfer > c:transfer",
            run_there,
            f"{run_there} > a:leg",
            *wanted,
        }
        assert not any(span.failed for span in spans)
        (leg,) = [span for span in spans if span.name == "leg"]
        assert (leg.attributes["peermem.fabric"], leg.attributes["peermem.retried"]) == ("tcp", 0)
        slices = [span for span in spans if span.name == "slice"]
        assert len(slices) == min(8, leg.attributes["peermem.slices"])
        (grant,) = [span for span in spans if span.name == "grant"]
        assert (grant.attributes["peermem.region"], grant.attributes["peermem.right"]) == (target.name, "write")
        page = traced.nodes["a"].scrape("application/openmetrics-text")
        assert f'# {{trace_id="{leg.trace}"}}' in page
        assert "trace_id" not in traced.nodes["a"].scrape()


def test_what_fails_says_why(traced: Traced) -> None:
    with peermem.connect(traced.nodes["a"].target) as a:
        source = a.create_region(device="bar0", length=MIB, name="alone")
        assert traced.job("c", source.name, "nodes/b/regions/none") == "REGION_NOT_FOUND"
        wanted = {("a", "transfer", "REGION_NOT_FOUND"), ("", "peermem.transfer", "REGION_NOT_FOUND")}

        def failed(spans: list[Seen]) -> set[tuple[str, str, object]]:
            return {(span.node, span.name, span.attributes.get("error.type")) for span in spans if span.failed}

        traced.collector.until(lambda _: wanted <= failed(traced.trace("nodes/b/regions/none")))


def test_any_caller_may_say_what_it_is_at_in_the_metadata_of_a_call(traced: Traced) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with peermem.connect(traced.nodes["a"].target) as a, grpc.insecure_channel(traced.nodes["a"].target) as channel:
        one, two = (a.create_region(device="bar0", length=4096) for _ in range(2))
        segments = [transfer_pb2.SegmentList(source=one.name, destination=two.name)]
        segments[0].ranges.CopyFrom(transfer_pb2.Ranges(source_offsets=[0], destination_offsets=[0], lengths=[4096]))
        request = transfer_pb2.CreateTransferRequest(segments=segments)
        stub = transfer_pb2_grpc.TransferServiceStub(channel)
        stub.CreateTransfer(request, timeout=10, metadata=(("traceparent", parent),))
        _, trace_id, span_id, _ = parent.split("-")
        mine = ("transfer", trace_id, span_id)
        traced.collector.until(lambda spans: mine in [(span.name, span.trace, span.parent) for span in spans])


def test_a_load_is_a_part_of_what_the_job_is_at(traced: Traced, tmp_path: Path) -> None:
    file = traced.nodes["a"].folder.parent / "model"
    file.write_bytes(bytes(MIB))
    own = TracerProvider(shutdown_on_exit=False).get_tracer("job").start_span("step")
    trace_id = f"{own.get_span_context().trace_id:032x}"
    with peermem.connect(traced.nodes["a"].target) as a, trace.use_span(own):
        a.create_region(device="bar0", length=MIB).load(str(file))
    spans = traced.collector.until(lambda spans: any(span.trace == trace_id for span in spans))
    (load,) = [span for span in spans if span.trace == trace_id]
    assert (load.node, load.name, load.attributes["peermem.file"]) == ("a", "storage.load", str(file))


def test_who_is_not_traced_begins_no_trace(traced: Traced) -> None:
    with peermem.connect(traced.nodes["a"].target) as a, peermem.connect(traced.nodes["b"].target) as b:
        source = a.create_region(device="bar0", length=4096, name="quiet")
        target = b.create_region(device="bar0", length=4096, name="unheard")
        before = len(traced.collector.spans)
        b.transfer(source, target).wait()
        assert traced.job("a", source.name, target.name) == ""
        heard = traced.trace(target.name)
        assert len({span.trace for span in traced.collector.spans[before:]}) == 1
        assert "b:transfer" not in {f"{span.node}:{span.name}" for span in heard}


def test_nothing_of_it_is_loaded_where_nobody_asks(traced: Traced) -> None:
    assert run([sys.executable, "-c", QUIET, traced.nodes["a"].target]) == "[]"
