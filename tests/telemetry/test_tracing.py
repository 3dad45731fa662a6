"""How a daemon begins and ends to send spans; what it sends is in `tests/e2e/test_tracing.py`."""

from __future__ import annotations

import sys
import time

import pytest
from tests.collector import collecting

from peermem.core import spans
from peermem.telemetry.tracing import start_tracing


def test_the_last_spans_are_sent_at_the_end() -> None:
    with collecting() as (collector, endpoint):
        end = start_tracing(endpoint, 1.0, "a", "epoch-a")
        spans.begin("transfer", length=1).end()
        end()
        (span,) = collector.until(bool)
        assert (span.name, span.node, span.attributes) == ("transfer", "a", {"peermem.length": 1})
        assert spans.begin("transfer") is spans.UNKEPT


def test_a_share_of_none_keeps_nothing() -> None:
    with collecting() as (collector, endpoint):
        end = start_tracing(endpoint, 0.0, "a", "epoch-a")
        span = spans.begin("transfer")
        assert span.trace_id == ""
        assert span.traceparent.endswith("-00")
        end()
        assert collector.spans == []


def test_a_collector_that_is_not_there_holds_up_nobody() -> None:
    end = start_tracing("http://127.0.0.1:1", 1.0, "a", "epoch-a")
    for _ in range(10_000):
        spans.begin("transfer").end()
    began = time.monotonic()
    end()
    assert time.monotonic() - began < 8


def test_packages_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(OSError, match=r"opentelemetry.sdk.trace is missing, which comes with peermem\[tracing\]"):
        start_tracing("http://127.0.0.1:4317", 1.0, "a", "epoch-a")
