"""What the copying process does, without the process: which words it touches, and that no bit changes on the way."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peermem.device.word_copier import (
    BLOCK,
    MESSAGE_PIECES,
    WORD,
    Answer,
    Order,
    Words,
    answers,
    pack_answer,
    pack_request,
    spans,
    unpack_answer,
    unpack_request,
)

SIZE = 4 * BLOCK


@pytest.fixture
def bar() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, SIZE) as mapping:
        yield mapping


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("buffer")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@given(st.integers(0, 3 * BLOCK), st.integers(0, 3 * BLOCK))
def test_the_spans_of_a_range_are_whole_words_that_hold_just_its_bytes(offset: int, length: int) -> None:
    at = offset
    for span in spans(offset, length):
        assert span.words * WORD <= BLOCK
        assert span.first * WORD + span.before == at
        assert 0 <= span.before < WORD
        assert 0 <= span.after < WORD
        assert span.length >= 1
        at += span.length
        assert (span.first + span.words) * WORD - span.after == at
    assert at == max(offset, offset + length)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, SIZE), st.integers(0, SIZE), st.integers(0, 40), st.randoms(use_true_random=False))
def test_bytes_are_the_same_at_any_offset(start: int, end: int, position: int, random: object) -> None:
    offset, length = min(start, end), abs(end - start)
    file = os.memfd_create("buffer")
    with mmap.mmap(-1, SIZE) as mapping:
        before = os.urandom(SIZE)
        mapping[:] = before
        data = os.urandom(length)
        os.pwrite(file, bytes(position) + data, 0)
        words = Words(mapping)
        words.store(file, offset, position, length)
        assert mapping[:] == before[:offset] + data + before[offset + length :]
        words.load(file, offset, position + 1, length)
        assert os.pread(file, length, position + 1) == data
        del words
    os.close(file)


def test_no_bit_changes_whatever_number_the_word_would_be(bar: mmap.mmap, file: int) -> None:
    numbers = [0, 1, 1 << 63, 0x7FF0000000000000, 0x7FF0000000000001, 0x7FF8000000000000, 0xFFF7FFFFFFFFFFFF, 2**64 - 1]
    data = struct.pack(f"@{len(numbers)}Q", *numbers)
    os.pwrite(file, data, 0)
    words = Words(bar)
    words.store(file, 0, 0, len(data))
    assert bar[: len(data)] == data
    words.load(file, 0, 4096, len(data))
    assert os.pread(file, len(data), 4096) == data
    del words


def test_a_file_that_fails_is_an_error(bar: mmap.mmap, file: int) -> None:
    words = Words(bar)
    with pytest.raises(OSError, match="ended early"):
        words.store(file, 0, SIZE - 1, 2)
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space"):
        words.load(full.fileno(), 0, 0, 8)
    del words


@given(st.sampled_from(Order), st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 3), max_size=5))
def test_requests_cross_as_they_are(order: Order, pieces: list[tuple[int, int, int]]) -> None:
    assert unpack_request(pack_request(order, pieces)) == (order, pieces)


def test_the_longest_request_fits_into_a_datagram() -> None:
    assert len(pack_request(Order.LOAD, [(1, 2, 3)] * MESSAGE_PIECES)) < 1 << 15


def test_answers_cross_as_they_are() -> None:
    assert unpack_answer(pack_answer(Answer.FAILED, 28)) == (Answer.FAILED, 28)


@pytest.mark.parametrize(
    ("head", "there"),
    [("f41a10110700", True), ("f41a10110200", True), ("f41a10110500", False), ("ffffffffffff", False), ("f41a", False)],
)
def test_a_function_answers_when_it_is_there_and_its_memory_is_on(file: int, head: str, there: bool) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, bytes.fromhex(head), 0)
    assert answers(file) is there


def test_a_function_that_was_removed_does_not_answer() -> None:
    left, right = os.pipe()
    assert not answers(left)
    os.close(left)
    os.close(right)
