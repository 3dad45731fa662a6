"""The process in which device memory is touched: it copies between one mapped BAR range and files.

Rules of this file:

* Device memory is read and written only in aligned words of 8 bytes, and a store writes each of them once; of a word
  that it covers in part, the other bytes are read and written back. The kernel's copy, and the C library's, may go byte
  by byte.
* A load or store on a BAR that has vanished is SIGBUS. It ends this process, which holds nothing else.
* The answer to a request says that the function still answers: a function that is off reads as ones and drops what is
  written, without any fault. Asking it also pushes the stores before it through to the device (PCI ordering rules).
* Requests are carried out and answered in order. The end of the socket is the end of the process, whatever ended the
  daemon; SIGINT and SIGTERM, which reach a whole group, do not.
* It runs as a file of its own (`python word_copier.py BAR CONFIG SOCKET OFFSET SIZE`, the first three inherited
  descriptors), imports nothing of the package, and so starts in some 20 ms.

Why words travel as floats: `struct.unpack_from("@nd")` and the assignment of a slice of a ctypes array of c_double are
loops in C in which each word is one 8-byte move, and no bit of it changes. `struct.pack_into` clears its whole target
first; setting a c_uint64 reads it first (Python 3.11); both were found in the machine code. Integers also cost twice.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

WORD = 8
BLOCK = 16 << 10
"""Bytes copied at once, at most; a multiple of WORD."""
MESSAGE_PIECES = 1024
"""Most pieces of one request, which makes it 24 KiB."""

_PIECE = 3
_COMMAND, _MEMORY_SPACE = 4, 0x2  # PCI configuration space: the Command register and its Memory Space bit
_NOBODY = b"\xff\xff"  # the Vendor ID that reads where no function answers


class Order(IntEnum):
    """What a request asks for."""

    LOAD = 1
    """From the device into the file."""
    STORE = 2
    """From the file into the device."""


class Answer(IntEnum):
    """How a request, or the mapping at the start, ended."""

    DONE = 0
    FAILED = 1
    """With an errno: the BAR can't be mapped, or the file can't be read or written."""
    OFF = 2
    """The function does not answer, or its memory is switched off; what was copied means nothing."""


class Span(NamedTuple):
    """Consecutive words that hold a range of bytes."""

    first: int
    """Index of the first word."""
    words: int
    """How many."""
    before: int
    """Bytes of the first word that are not in the range."""
    after: int
    """Bytes of the last word that are not in the range."""

    @property
    def length(self) -> int:
        """Bytes of the range."""
        return self.words * WORD - self.before - self.after


def spans(offset: int, length: int) -> Iterator[Span]:
    """Yield the words that hold `length` bytes from `offset` on, in order, cut at multiples of BLOCK."""
    end = offset + length
    while offset < end:
        cut = min(end, (offset // BLOCK + 1) * BLOCK)
        first, end_word = offset // WORD, -(-cut // WORD)
        yield Span(first, end_word - first, offset % WORD, end_word * WORD - cut)
        offset = cut


def pack_request(order: Order, pieces: list[tuple[int, int, int]]) -> bytes:
    """Return the datagram of a request; the file's descriptor goes with it. Pieces are as a Copier takes them."""
    return struct.pack(f"@{1 + _PIECE * len(pieces)}Q", order, *(number for piece in pieces for number in piece))


def unpack_request(data: bytes) -> tuple[Order, list[tuple[int, int, int]]]:
    """Return what `pack_request` was given."""
    order, *numbers = struct.unpack(f"@{len(data) // WORD}Q", data)
    return Order(order), list(zip(*(iter(numbers),) * _PIECE, strict=True))


def pack_answer(answer: Answer, errno: int = 0) -> bytes:
    """Return the datagram of an answer."""
    return struct.pack("@2Q", answer, errno)


def unpack_answer(data: bytes) -> tuple[Answer, int]:
    """Return the answer and the errno."""
    answer, errno = struct.unpack("@2Q", data)
    return Answer(answer), errno


class Words:
    """Device memory as words. Nothing but `load` and `store` touches it."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._words = (ctypes.c_double * (len(mapping) // WORD)).from_buffer(mapping)

    def load(self, file: int, offset: int, file_offset: int, length: int) -> None:
        """Copy `length` bytes at `offset` into a file. Raises OSError."""
        for span in spans(offset, length):
            data = memoryview(self._read(span.first, span.words))[span.before : span.before + span.length]
            if os.pwrite(file, data, file_offset) != span.length:
                raise OSError(errno.ENODATA, "the file took less")
            file_offset += span.length

    def store(self, file: int, offset: int, file_offset: int, length: int) -> None:
        """Copy `length` bytes of a file to `offset`. Raises OSError."""
        for span in spans(offset, length):
            data = os.pread(file, span.length, file_offset)
            if len(data) != span.length:
                raise OSError(errno.ENODATA, "the file ended early")
            self._write(span, data)
            file_offset += span.length

    def _write(self, span: Span, data: bytes) -> None:
        if span.before:
            data = self._read(span.first, 1)[: span.before] + data
        if span.after:
            data += self._read(span.first + span.words - 1, 1)[-span.after :]
        self._words[span.first : span.first + span.words] = struct.unpack(f"@{span.words}d", data)  # type: ignore[call-overload]

    def _read(self, word: int, count: int) -> bytes:
        words = f"@{count}d"
        return struct.pack(words, *struct.unpack_from(words, self._mapping, word * WORD))


def serve(words: Words, config: int, requests: socket.socket) -> None:
    """Carry out requests until the other end closes the socket."""
    while True:
        data, files, _, _ = socket.recv_fds(requests, WORD * (1 + _PIECE * MESSAGE_PIECES), 1)
        if not data:
            return
        requests.send(_carry_out(words, config, data, files[0]))


def _carry_out(words: Words, config: int, data: bytes, file: int) -> bytes:
    order, pieces = unpack_request(data)
    copy = words.load if order is Order.LOAD else words.store
    try:
        for offset, file_offset, length in pieces:
            copy(file, offset, file_offset, length)
    except OSError as error:
        return pack_answer(Answer.FAILED, error.errno or 0)
    finally:
        os.close(file)
    return pack_answer(Answer.DONE if answers(config) else Answer.OFF)


def answers(config: int) -> bool:
    """Whether the function of this configuration space is there and lets its memory be accessed."""
    try:
        head = os.pread(config, _COMMAND + 1, 0)
    except OSError:  # the function was removed
        return False
    return len(head) > _COMMAND and head[:2] != _NOBODY and bool(head[_COMMAND] & _MEMORY_SPACE)


def main(bar: int, config: int, connection: int, offset: int, size: int) -> None:
    """Map the BAR range, say how that went, and serve."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the jobs' bytes
    with socket.socket(fileno=connection) as requests:
        try:
            mapping = mmap.mmap(bar, size, offset=offset)
        except OSError as error:
            requests.send(pack_answer(Answer.FAILED, error.errno or 0))
            return
        os.close(bar)
        requests.send(pack_answer(Answer.DONE))
        serve(Words(mapping), config, requests)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
