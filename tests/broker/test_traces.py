"""What traces hold of transfers, loads and grants of brokers, as OpenTelemetry's SDK keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

from peermem.broker.leg_trace import AGAIN, FIRST
from peermem.core import errors, spans
from peermem.core.identity import ANONYMOUS
from peermem.core.storage import Order, StorageRequest
from peermem.core.transfer import State, TransferRequest
from peermem.fabric.base import Status
from peermem.otel import OtelKeeper
from tests.broker.support import eventually, failure, outcome, region, start, whole
from tests.broker.test_storage import StorageHost
from tests.broker.test_storage import host as host
from tests.broker.test_storage import outcome as carried_out
from tests.doubles import MIB, Host

KEPT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_KEPT = f"{KEPT[:-1]}0"


class Kept:
    """The spans that ended so far."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def all(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


def told(span: ReadableSpan) -> dict[str, object]:
    """Return a span's attributes, without the prefix of this project's own."""
    return {name.removeprefix("peermem."): value for name, value in (span.attributes or {}).items()}


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    spans.keep_with(OtelKeeper(kept.provider))
    yield kept
    spans.keep_with(None)
    kept.provider.shutdown()


async def test_a_transfer_has_a_leg_and_the_leg_its_grant_and_slices(kept: Kept, pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 64 * MIB), await region(b, 64 * MIB)
    facts = await outcome(await start(a, whole(source, sink)))
    await eventually(lambda: bool(kept.named("grant")))
    transfer, leg, acquired, grant = map(kept.one, ("transfer", "leg", "grant.acquire", "grant"))
    assert [span.parent and span.parent.span_id for span in (transfer, leg, acquired, grant)] == [
        None,
        transfer.context.span_id,
        leg.context.span_id,
        acquired.context.span_id,
    ]
    assert facts.trace_id == f"{transfer.context.trace_id:032x}"
    assert told(transfer) == {
        "transfer": str(facts.name),
        "source": str(source.name),
        "destination": str(sink.name),
        "length": 64 * MIB,
        "segments": 1,
        "state": "SUCCEEDED",
        "done": 64 * MIB,
    }
    assert told(leg)["slices"] == 64
    assert len(kept.named("slice")) == FIRST
    assert all(told(each)["status"] == "SUCCESS" for each in kept.named("slice"))
    page = a.metrics.render("application/openmetrics-text")[0].decode()
    assert f'# {{trace_id="{facts.trace_id}"}}' in page


async def test_slices_that_go_out_again_have_spans_up_to_a_bound(kept: Kept, pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, 64 * MIB), await region(b, 64 * MIB)
    a.tcp.statuses = [*[Status.SUCCESS] * 0, *[Status.WR_FLUSH_ERR] * 40]
    assert (await outcome(await start(a, whole(source, sink)))).state is State.SUCCEEDED
    again = [span for span in kept.named("slice") if told(span)["again"]]
    assert AGAIN <= len(again) <= AGAIN + FIRST
    assert told(kept.one("leg"))["retried"] == 40
    failed = [span for span in kept.named("slice") if not span.status.is_ok]
    assert failed
    assert {told(span)["status"] for span in failed} == {"WR_FLUSH_ERR"}


async def test_what_fails_is_told_by_its_reason(kept: Kept, pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held > 0)
    transfer.fail(errors.TransferCancelled("It was cancelled."))
    a.tcp.let_go()
    await outcome(transfer)
    for span in (kept.one("transfer"), kept.one("leg")):
        assert (span.status.is_ok, told(span)["error.type"]) == (False, "TRANSFER_CANCELLED")


async def test_a_grant_that_is_refused_fails_where_it_was_asked_for(kept: Kept, pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    wanted = whole(source, sink)
    await b.broker.delete_region(ANONYMOUS, sink.name, force=False)
    assert isinstance(await failure(await start(a, wanted)), errors.RegionNotFound)
    assert told(kept.one("grant.acquire"))["error.type"] == "REGION_NOT_FOUND"
    assert kept.named("grant") == []


async def test_what_a_caller_decided_holds(kept: Kept, pair: list[Host]) -> None:
    a, b = pair
    spans.keep_with(OtelKeeper(TracerProvider(ParentBased(ALWAYS_OFF), shutdown_on_exit=False)))
    source, sink = await region(a, MIB), await region(b, MIB)

    async def trace(parent: str) -> str:
        request = TransferRequest([whole(source, sink)], traceparent=parent)
        return (await outcome(await a.broker.create_transfer(ANONYMOUS, request, relayed=False))).trace_id

    assert await trace(KEPT) == KEPT.split("-")[1]
    assert await trace(NOT_KEPT) == ""
    assert await trace("") == ""


async def test_a_grant_of_who_is_not_traced_begins_no_trace(kept: Kept, pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    request = TransferRequest([whole(source, sink)], traceparent=NOT_KEPT)
    spans.keep_with(None)
    transfer = await a.broker.create_transfer(ANONYMOUS, request, relayed=False)
    spans.keep_with(OtelKeeper(kept.provider))
    await outcome(transfer)
    await eventually(lambda: b.broker.serving.grant_count == 0)
    assert kept.all() == ()


async def test_no_key_is_in_a_span(kept: Kept, pair: list[Host]) -> None:
    a, b = pair
    source, sink = await region(a, MIB), await region(b, MIB)
    a.tcp.hold = True
    transfer = await start(a, whole(source, sink))
    await eventually(lambda: a.tcp.held > 0)
    key = a.tcp.links[0].held[0].key.rkey
    a.tcp.let_go()
    await outcome(transfer)
    await eventually(lambda: bool(kept.named("grant")))
    text = json.dumps([json.loads(span.to_json()) for span in kept.all()])
    assert str(key) not in text
    assert f"{key:x}" not in text


async def test_loads_and_stores(kept: Kept, host: StorageHost, tmp_path: Path) -> None:
    made = await region(host, 8 * MIB)
    request = StorageRequest(Order.LOAD, made.name, 0, str(tmp_path / "x"), None, 0, False, KEPT)
    facts = await carried_out(host, request)
    span = kept.one("storage.load")
    assert f"{span.context.trace_id:032x}" == KEPT.split("-")[1]
    assert (told(span)["length"], told(span)["done"]) == (facts.bytes_total, facts.bytes_total)
    with pytest.raises(errors.PeermemError):
        await carried_out(host, StorageRequest(Order.LOAD, made.name, 0, str(tmp_path / "none"), None, 0, False))
    assert not kept.named("storage.load")[-1].status.is_ok
