"""Keys and values in etcd: what is written is read, and whatever else is there is refused and nothing worse."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.config_values import Address, DeviceSize, Name
from peermem.core.names import ChildName
from peermem.core.node import NodeDevice
from peermem.directory.base import NodeEntry
from peermem.directory.records import (
    BadRecord,
    Keys,
    NodeRecord,
    read_node,
    read_region,
    write_node,
    write_region,
)
from tests.directory.support import FULL, region
from tests.fuzzing import fuzz, tried

KEYS = Keys("/peermem/v1", "lab")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)


def test_what_is_written_is_read() -> None:
    assert read_node("a", write_node(NodeRecord(FULL, "m"))) == NodeRecord(FULL, "m")
    named = region("x", "a", **{"a/b": "ü", "k": ""})
    assert read_region(named.name, write_region(named)) == named


def test_values_of_a_configuration_are_written_as_they_are() -> None:
    device = NodeDevice(Name("bar0"), "memfd", DeviceSize("4KiB"))
    entry = NodeEntry(Name("a"), Address("10.0.0.1:7470"), devices=(device,))
    assert read_node("a", write_node(NodeRecord(entry))).entry == entry


def test_keys_lead_back_to_names() -> None:
    assert KEYS.node("a") == b"/peermem/v1/lab/nodes/a"
    assert KEYS.node_of(KEYS.node("a")) == "a"
    labelled = region("x", "n-1", **{"a/b=c": "ü/="})
    first, second = KEYS.of_region(labelled)
    assert first == b"/peermem/v1/lab/regions/n-1/x"
    assert second == b"/peermem/v1/lab/labels/a%2Fb%3Dc=%C3%BC%2F%3D/n-1/x"
    span = KEYS.of_label("a/b=c", "ü/=")
    assert KEYS.region_of(span, second) == ChildName("n-1", "regions", "x")
    assert span.start <= second < span.end


@pytest.mark.parametrize("other", ["lab2", "la", "lab-2"])
def test_spans_of_one_cluster_hold_nothing_of_another(other: str) -> None:
    theirs = Keys("/peermem/v1", other)
    for key in (theirs.node("a"), *theirs.of_region(region("x", step="1"))):
        for span in (KEYS.nodes, KEYS.regions, KEYS.of_label("step", "1")):
            assert not span.start <= key < span.end


def test_a_label_is_not_mistaken_for_a_longer_one() -> None:
    (_, longer) = KEYS.of_region(region("x", step="10"))
    span = KEYS.of_label("step", "1")
    assert not span.start <= longer < span.end


def refusal(read: Callable[[], object]) -> str | None:
    """Return why something is refused, None where it is not."""
    try:
        read()
    except BadRecord as bad:
        return str(bad)
    return None


@fuzz(30)
@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_record_or_refused(value: bytes) -> None:
    tried("directory values")
    assert refusal(lambda: read_node("a", value)) != ""
    assert refusal(lambda: read_region(ChildName("a", "regions", "x"), value)) != ""


FIELDS = ("machine", "epoch", "version", "fabrics", "nics", "devices", "more")


@fuzz(30)
@given(st.fixed_dictionaries({"v": st.just(1), "address": st.just("a:1")}, optional=dict.fromkeys(FIELDS, JSON)))
def test_a_node_with_any_fields_is_a_node_or_refused(fields: dict[str, object]) -> None:
    tried("directory values")
    value = json.dumps(fields).encode()
    if refusal(lambda: read_node("a", value)) is None:
        entry = read_node("a", value).entry
        texts = (entry.epoch, entry.version, *entry.nics, *(device.name for device in entry.devices))
        assert all(text.isascii() and text.isprintable() for text in texts)


@fuzz(30)
@given(st.binary())
def test_any_key_is_a_name_or_refused(key: bytes) -> None:
    tried("directory keys")
    assert refusal(lambda: KEYS.node_of(key)) != ""
    assert refusal(lambda: KEYS.region_of(KEYS.regions, key)) != ""
