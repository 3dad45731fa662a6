"""Spans of which nobody keeps any: they pass on what they were given, and hold nothing."""

from __future__ import annotations

import pytest

from peermem.core import spans

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_trace_goes_on_through_who_keeps_none() -> None:
    span = spans.begin("transfer", PARENT, length=1)
    assert (span.traceparent, span.trace_id) == (PARENT, "")
    with span.child("leg", fabric="tcp") as leg:
        leg.note(slices=1)
        assert leg.traceparent == PARENT
    leg.end(RuntimeError())
    span.end()


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "00",
        PARENT.upper(),
        PARENT[:-1],
        f"{PARENT}0",
        f"ff{PARENT[2:]}",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        f"{PARENT}\n",
        "00-<script>alert(1)</script>-b7ad6b7169203331-01",
    ],
)
def test_what_is_no_traceparent_is_none(parent: str) -> None:
    assert spans.traceparent(parent) == ""


def test_without_a_parent_there_is_no_trace() -> None:
    assert spans.traceparent(PARENT) == PARENT
    assert spans.begin("transfer") is spans.UNKEPT
    assert spans.join("grant", "") is spans.UNKEPT
    assert spans.UNKEPT.traceparent == ""


def test_an_error_leaves_a_span_as_it_is() -> None:
    with pytest.raises(RuntimeError), spans.begin("transfer"):
        raise RuntimeError
