"""The bytes of the tcp fabric's frames; pure, so that it can be tested and fuzzed without a socket.

Rules of this file:

* All numbers are little-endian and unsigned. Every connection starts as `tcp_proof.py` says; then requests go one way
  and responses, in the order of the requests, the other way.
* A request is a head, its ranges, and for a WRITE the payload of all ranges back to back:

      magic "PM"  version u8  opcode u8  count u32  wr_id u64  rkey u64  total u64
      count x (offset u64, length u64)

  The head and the first range are read together: no request is shorter.
* A response is DATA, followed by the payload of a READ, or ACK with the final status. A READ is answered
  by DATA and then ACK, or by ACK alone when it is refused; a WRITE by ACK, after its whole payload:

      magic "PM"  kind u8  status u8  length u32  wr_id u64

* Between requests, and between whole responses, either end carries messages for the daemons, which are no part of that
  order. What is as long as a request's head with its first range, or as a response, stands before each, and the MAC
  in the range's place or behind the head:

      magic "PM"  version u8  3 u8  0 u32  0 u64  0 u64  length u64  mac 16
      magic "PM"  3 u8  0 u8  length u32  0 u64  mac 16

* What can be framed is answered, however wrong; what can't raises MalformedMessage and ends the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from peermem.core.errors import MalformedMessage
from peermem.fabric.base import CARRIED, Opcode, Status
from peermem.fabric.tcp_proof import MAC_SIZE, VERSION

MAX_RANGES = 1024
"""Pairs of ranges of one request."""
MAX_TOTAL = 64 << 20
"""Payload bytes of one request."""

_MAGIC = b"PM"
_HEAD = struct.Struct("<2sBBIQQQ")
_RANGE = struct.Struct("<QQ")
_RESPONSE = struct.Struct("<2sBBIQ")
_ACK, _DATA, _MESSAGE = 1, 2, 3

HEAD_SIZE = _HEAD.size + _RANGE.size
RANGE_SIZE = _RANGE.size
RESPONSE_SIZE = _RESPONSE.size
assert RANGE_SIZE == MAC_SIZE, "a MAC stands in a range's place"

_OPCODES = {opcode.value: opcode for opcode in Opcode}
_CODES = {Status.SUCCESS: 0, Status.REM_INV_REQ_ERR: 1, Status.REM_ACCESS_ERR: 2, Status.REM_OP_ERR: 3}
_STATUSES = {code: status for status, code in _CODES.items()}


@dataclass(frozen=True, slots=True)
class Carried:
    """What stands before a message for the daemon."""

    head: bytes
    """Under the MAC, too."""
    length: int
    """Bytes of the message."""
    mac: bytes = field(repr=False)
    """Empty before a response's."""


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The fixed part of a request."""

    opcode: Opcode
    count: int
    """Ranges."""
    wr_id: int
    rkey: int = field(repr=False)
    total: int
    """Bytes of all ranges."""


@dataclass(frozen=True, slots=True)
class Response:
    """An ACK, whose `length` is None, or the head of a READ's data."""

    wr_id: int
    status: Status
    length: int | None


def encode_request(head: RequestHead, offsets: Sequence[int], lengths: Sequence[int]) -> bytes:
    """Return a request without its payload. Raises ValueError for what the protocol can't say."""
    if not (1 <= head.count <= MAX_RANGES and head.total <= MAX_TOTAL):
        raise ValueError(f"{head.count} ranges of {head.total} bytes are beyond one frame")
    if sum(lengths) != head.total:
        raise ValueError(f"ranges of {sum(lengths)} bytes are said to have {head.total}")
    ranges = [0] * (2 * head.count)
    ranges[0::2] = offsets
    ranges[1::2] = lengths
    try:
        fixed = _HEAD.pack(_MAGIC, VERSION, head.opcode.value, head.count, head.wr_id, head.rkey, head.total)
        return fixed + struct.pack(f"<{len(ranges)}Q", *ranges)
    except struct.error as error:
        raise ValueError(f"a number of the request is not within 64 bits: {error}") from None


def question_head(length: int) -> bytes:
    """Return the head of a message for the serving daemon; its MAC and its `length` bytes follow. Raises ValueError."""
    return _HEAD.pack(_MAGIC, VERSION, _MESSAGE, 0, 0, 0, _carried(length))


def answer_head(length: int) -> bytes:
    """Return the head of a message for the daemon that opened the link; its MAC and its `length` bytes follow. Raises
    ValueError."""
    return _RESPONSE.pack(_MAGIC, _MESSAGE, 0, _carried(length), 0)


def _carried(length: int) -> int:
    if not 1 <= length <= CARRIED:
        raise ValueError(f"{length} bytes are no message for a daemon, which has 1 to {CARRIED}")
    return length


def decode_head(block: bytes | bytearray) -> RequestHead | Carried:
    """Return what the first HEAD_SIZE bytes of a request, or before a message, say. Raises MalformedMessage."""
    magic, version, code, count, wr_id, rkey, total = _HEAD.unpack_from(block)
    opcode = _OPCODES.get(code)
    if magic == _MAGIC and version == VERSION and code == _MESSAGE and 1 <= total <= CARRIED:
        return Carried(bytes(block[: _HEAD.size]), total, bytes(block[_HEAD.size :]))
    if magic != _MAGIC or version != VERSION or opcode is None:
        raise MalformedMessage("The bytes are no request of this version of the protocol.")
    if not (1 <= count <= MAX_RANGES and total <= MAX_TOTAL):
        raise MalformedMessage(
            f"A request has {count} ranges of {total} bytes; at most {MAX_RANGES} of {MAX_TOTAL} are allowed."
        )
    return RequestHead(opcode, count, wr_id, rkey, total)


def first_range(block: bytes | bytearray) -> bytes:
    """Return the bytes of the first range, which are read with the head."""
    return bytes(block[_HEAD.size : HEAD_SIZE])


def decode_ranges(block: bytes | bytearray) -> tuple[Sequence[int], Sequence[int]]:
    """Return offsets and lengths of whole ranges."""
    numbers = struct.unpack(f"<{len(block) // 8}Q", block)
    return numbers[0::2], numbers[1::2]


def encode_ack(wr_id: int, status: Status) -> bytes:
    """Return the answer that ends a request."""
    return _RESPONSE.pack(_MAGIC, _ACK, _CODES[status], 0, wr_id)


def encode_data(wr_id: int, length: int) -> bytes:
    """Return the head of a READ's payload of `length` bytes."""
    return _RESPONSE.pack(_MAGIC, _DATA, 0, length, wr_id)


def decode_response(block: bytes | bytearray) -> Response | Carried:
    """Return what RESPONSE_SIZE bytes, also before a message, say. Raises MalformedMessage."""
    magic, kind, code, length, wr_id = _RESPONSE.unpack(block)
    status = _STATUSES.get(code)
    if magic == _MAGIC and status is not None:
        if kind == _ACK and length == 0:
            return Response(wr_id, status, None)
        if kind == _DATA and status is Status.SUCCESS:
            return Response(wr_id, status, length)
        if kind == _MESSAGE and 1 <= length <= CARRIED:
            return Carried(bytes(block), length, b"")
    raise MalformedMessage("The bytes are no response of the protocol.")
