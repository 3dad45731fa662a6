"""What daemons tell each other of links and grants: it arrives as it was, and nothing hostile gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.errors import InvalidField
from peermem.core.types import FabricKind, GrantedKey, KeyPart, LinkAttributes, QueuePair, RemoteKey
from peermem.v1 import link_pb2
from peermem.wire_links import (
    MAX_RAILS,
    grant_from_proto,
    grant_to_proto,
    opened_from_proto,
    opened_to_proto,
    queue_pairs_from_proto,
    queue_pairs_to_proto,
)

END = QueuePair("rxe1/1", 17, 0xFFFFFF, bytes(range(16)), 3, 4096, 16)
PARTS = [KeyPart(7, 1 << 40, 4096), KeyPart(8, 1 << 41, 904)]
GRANTED = GrantedKey(5, RemoteKey(1 << 63, 5000, [PARTS, []]), 30.0, 1 << 62, True)


def test_what_is_told_arrives() -> None:
    attributes = LinkAttributes(FabricKind.VERBS, 2, b"i" * 16, "", b"", (END, END))
    assert opened_from_proto(FabricKind.VERBS, opened_to_proto(attributes, "epoch")) == attributes
    assert grant_from_proto(grant_to_proto(GRANTED)) == GRANTED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", 1 << 24),
        ("psn", 1 << 24),
        ("lid", 1 << 16),
        ("reads", 256),
        ("gid", b""),
        ("gid", bytes(17)),
        ("mtu", 0),
        ("mtu", 9000),
        ("nic", "n" * 129),
    ],
)
def test_ends_of_rails_that_cant_be_are_refused(field: str, value: object) -> None:
    (message,) = queue_pairs_to_proto([END])
    setattr(message, field, value)
    with pytest.raises(InvalidField) as caught:
        queue_pairs_from_proto([message])
    assert caught.value.metadata["field"] == f"queue_pairs.{field}"


def test_too_many_ends_are_refused() -> None:
    with pytest.raises(InvalidField, match="at most 16"):
        queue_pairs_from_proto(queue_pairs_to_proto([END] * (MAX_RAILS + 1)))


@pytest.mark.parametrize("length", [4999, 5001, 0])
def test_parts_make_up_the_whole(length: int) -> None:
    message = grant_to_proto(GRANTED)
    message.length = length
    with pytest.raises(InvalidField, match="make up"):
        grant_from_proto(message)


def test_too_many_rails_of_a_grant_are_refused() -> None:
    message = grant_to_proto(GRANTED)
    message.rails.extend([link_pb2.RailKey()] * MAX_RAILS)
    with pytest.raises(InvalidField, match="more than"):
        grant_from_proto(message)


@pytest.mark.parametrize("alignment", [3, 4095, 1 << 17, (1 << 32) - 1])
def test_an_alignment_that_nothing_has_is_refused(alignment: int) -> None:
    """Slices are cut at its multiples: one that is larger than a slice would never end."""
    message = grant_to_proto(GRANTED)
    message.alignment = alignment
    with pytest.raises(InvalidField, match="power of 2"):
        grant_from_proto(message)


def test_keys_are_in_no_repr() -> None:
    shown = repr(GRANTED) + repr(END)
    for secret in (str(1 << 63), str(1 << 40), "rkey=7"):
        assert secret not in shown


@given(st.binary(max_size=200))
def test_any_bytes_are_a_grant_or_refused(data: bytes) -> None:
    message = link_pb2.Grant()
    try:
        message.ParseFromString(data)
    except Exception:
        return
    try:
        granted = grant_from_proto(message)
    except InvalidField:
        return
    assert all(not parts or sum(part.length for part in parts) == granted.key.length for parts in granted.key.rails)
