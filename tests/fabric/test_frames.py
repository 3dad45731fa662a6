from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.errors import MalformedMessage
from peermem.fabric import frames
from peermem.fabric.base import CARRIED, Opcode, Status

U64 = st.integers(0, 2**64 - 1)
WIRE_STATUSES = [Status.SUCCESS, Status.REM_INV_REQ_ERR, Status.REM_ACCESS_ERR, Status.REM_OP_ERR]


def head(count: int = 1, total: int = 1, opcode: Opcode = Opcode.WRITE) -> frames.RequestHead:
    return frames.RequestHead(opcode, count, 7, 9, total)


@given(
    opcode=st.sampled_from(Opcode),
    wr_id=U64,
    rkey=U64,
    ranges=st.lists(st.tuples(U64, st.integers(0, 8192)), min_size=1, max_size=300),
)
def test_request_round_trip(opcode: Opcode, wr_id: int, rkey: int, ranges: list[tuple[int, int]]) -> None:
    offsets, lengths = tuple(offset for offset, _ in ranges), tuple(length for _, length in ranges)
    request = frames.RequestHead(opcode, len(ranges), wr_id, rkey, sum(lengths))
    encoded = frames.encode_request(request, offsets, lengths)
    block, rest = encoded[: frames.HEAD_SIZE], encoded[frames.HEAD_SIZE :]
    assert frames.decode_head(block) == request
    assert frames.decode_ranges(frames.first_range(block) + rest) == (offsets, lengths)


@given(wr_id=U64, status=st.sampled_from(WIRE_STATUSES), length=st.integers(1, frames.MAX_TOTAL))
def test_response_round_trip(wr_id: int, status: Status, length: int) -> None:
    assert frames.decode_response(frames.encode_ack(wr_id, status)) == frames.Response(wr_id, status, None)
    data = frames.encode_data(wr_id, length)
    assert frames.decode_response(data) == frames.Response(wr_id, Status.SUCCESS, length)


def test_a_request_is_these_bytes() -> None:
    encoded = frames.encode_request(head(2, 11), [1, 2], [5, 6])
    numbers = (7, 9, 11, 1, 5, 2, 6)
    assert encoded == b"PM\x02\x01\x02\0\0\0" + b"".join(number.to_bytes(8, "little") for number in numbers)


def test_responses_are_these_bytes() -> None:
    assert frames.encode_ack(7, Status.REM_ACCESS_ERR) == b"PM\x01\x02" + bytes(4) + b"\x07" + bytes(7)
    assert frames.encode_data(7, 258) == b"PM\x02\x00\x02\x01\x00\x00" + b"\x07" + bytes(7)


@pytest.mark.parametrize(
    ("offsets", "lengths", "total", "words"),
    [
        ([], [], 0, "beyond one frame"),
        ([0] * 1025, [1] * 1025, 1025, "beyond one frame"),
        ([0], [frames.MAX_TOTAL + 1], frames.MAX_TOTAL + 1, "beyond one frame"),
        ([0], [2], 1, "are said to have 1"),
        ([-1], [1], 1, "not within 64 bits"),
        ([2**64], [1], 1, "not within 64 bits"),
    ],
)
def test_what_can_not_be_said_is_not_encoded(offsets: list[int], lengths: list[int], total: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frames.encode_request(head(len(offsets), total), offsets, lengths)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, b"X"),  # magic
        (2, b"\x01"),  # version
        (3, b"\x00"),  # opcode
        (3, b"\x04"),
        (4, bytes(4)),  # no ranges
        (4, (1025).to_bytes(4, "little")),
        (24, (frames.MAX_TOTAL + 1).to_bytes(8, "little")),
    ],
)
def test_a_head_that_can_not_be_framed(position: int, value: bytes) -> None:
    block = bytearray(frames.encode_request(head(), [0], [1]))
    block[position : position + len(value)] = value
    with pytest.raises(MalformedMessage):
        frames.decode_head(block)


@pytest.mark.parametrize("wrong", [b"PM\x04\x00", b"PM\x03\x00", b"PM\x01\x09", b"PX\x01\x00", b"PM\x02\x01"])
def test_a_response_that_is_none(wrong: bytes) -> None:
    with pytest.raises(MalformedMessage):
        frames.decode_response(wrong + bytes(12))


@given(st.binary(min_size=frames.HEAD_SIZE, max_size=frames.HEAD_SIZE))
def test_any_head_is_understood_or_malformed(block: bytes) -> None:
    try:
        request = frames.decode_head(block)
    except MalformedMessage:
        return
    if isinstance(request, frames.Carried):
        assert 1 <= request.length <= CARRIED
        return
    assert 1 <= request.count <= frames.MAX_RANGES
    assert request.total <= frames.MAX_TOTAL


@given(st.binary(min_size=16, max_size=16))
def test_any_response_is_understood_or_malformed(response: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        frames.decode_response(response)


@pytest.mark.parametrize("length", [1, CARRIED])
def test_message_head_round_trip(length: int) -> None:
    head = frames.question_head(length)
    assert frames.decode_head(head + b"m" * 16) == frames.Carried(head, length, b"m" * 16)
    head = frames.answer_head(length)
    assert frames.decode_response(head) == frames.Carried(head, length, b"")


@pytest.mark.parametrize("length", [0, CARRIED + 1])
def test_a_message_that_no_frame_can_carry(length: int) -> None:
    for encode in (frames.question_head, frames.answer_head):
        with pytest.raises(ValueError, match="no message"):
            encode(length)
    question, answer = bytearray(frames.question_head(1) + bytes(16)), bytearray(frames.answer_head(1))
    question[24:32] = length.to_bytes(8, "little")
    answer[4:8] = length.to_bytes(4, "little")
    for decode, block in ((frames.decode_head, question), (frames.decode_response, answer)):
        with pytest.raises(MalformedMessage):
            decode(block)


def test_secrets_are_not_shown() -> None:
    shown = repr(frames.Carried(b"h" * 32, 1, b"s" * 16)) + repr(head())
    assert "sss" not in shown
    assert "9" not in shown
