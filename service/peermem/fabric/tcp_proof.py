"""How both ends of a connection of the tcp fabric prove that they know the link's secret, and sign what they carry for
their daemons. Pure, so that it can be tested and fuzzed without a socket.

Rules of this file:

* The secret itself never crosses the wire: it came over LinkService. Each end shows an HMAC-SHA-256 under it, of both
  ends' fresh random bytes, so that nothing that was seen on another connection is good on this one. The serving end
  greets, the other one says hello, the serving end welcomes it:

      "PMGR"  version u8  nonce 32
      "PMHI"  version u8  link_id 16  nonce 32  proof 32
      "PMWE"  version u8  proof 32

* What is carried has a MAC of 16 bytes under a key of its direction and of this connection alone, over its number in
  that direction, its head and its bytes. So it can't be made up, changed, left out, told twice, in another order, in
  the other direction or on another connection.
* Nothing is hidden: keys of grants and whatever else is carried can be read on the wire.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from dataclasses import dataclass, field

from peermem.core.errors import MalformedMessage

VERSION = 2
NONCE_SIZE = 32
MAC_SIZE = 16

_GREETING = struct.Struct(f"<4sB{NONCE_SIZE}s")
_HELLO = struct.Struct(f"<4sB16s{NONCE_SIZE}s32s")
_WELCOME = struct.Struct("<4sB32s")
_NUMBER = struct.Struct("<Q")

GREETING_SIZE = _GREETING.size
HELLO_SIZE = _HELLO.size
WELCOME_SIZE = _WELCOME.size


@dataclass(frozen=True, slots=True)
class Hello:
    """What a connection presents first."""

    link_id: bytes = field(repr=False)
    nonce: bytes = field(repr=False)
    proof: bytes = field(repr=False)


class Seal:
    """One direction of a connection: makes, or checks, the MACs of what is carried in it."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hmac.new(key, digestmod="sha256")  # copied for each message: setting up costs more than its bytes
        self._number = 0

    def mac(self, head: bytes | bytearray, body: bytes | bytearray) -> bytes:
        """Return the MAC of the next message."""
        sealed = self._keyed.copy()
        sealed.update(_NUMBER.pack(self._number))
        self._number += 1
        sealed.update(head)
        sealed.update(body)
        return sealed.digest()[:MAC_SIZE]

    def check(self, mac: bytes | bytearray, head: bytes | bytearray, body: bytes | bytearray) -> None:
        """Return where the next message is this one. Raises MalformedMessage."""
        if not hmac.compare_digest(bytes(mac), self.mac(head, body)):
            raise MalformedMessage("A message for the daemon is forged, changed, repeated or out of turn.")


class Proofs:
    """What the secret of a link proves on one connection."""

    def __init__(self, secret: bytes, link_id: bytes, greeting: bytes, hello: bytes) -> None:
        """`greeting` and `hello` are the random bytes of the serving and the other end."""
        self._secret = secret
        self._context = link_id + greeting + hello

    @property
    def hello(self) -> bytes:
        """What the end that opened the link shows."""
        return self._derived(b"peermem tcp hello")

    @property
    def welcome(self) -> bytes:
        """What the serving end shows."""
        return self._derived(b"peermem tcp welcome")

    def questions(self) -> Seal:
        """Return a new seal of what the end that opened the link carries."""
        return Seal(self._derived(b"peermem tcp questions"))

    def answers(self) -> Seal:
        """Return a new seal of what the serving end carries."""
        return Seal(self._derived(b"peermem tcp answers"))

    def _derived(self, label: bytes) -> bytes:
        return hmac.digest(self._secret, label + b"\0" + self._context, "sha256")


def fresh_nonce() -> bytes:
    """Return random bytes for one connection."""
    return secrets.token_bytes(NONCE_SIZE)


def encode_greeting(nonce: bytes) -> bytes:
    """Return the first bytes that the serving end sends."""
    return _GREETING.pack(b"PMGR", VERSION, nonce)


def decode_greeting(block: bytes | bytearray) -> bytes:
    """Return the random bytes in GREETING_SIZE bytes. Raises MalformedMessage."""
    magic, version, nonce = _GREETING.unpack(block)
    if magic != b"PMGR" or version != VERSION:
        raise MalformedMessage("what answers there is no tcp fabric of peermem, or of another version")
    return bytes(nonce)


def encode_hello(hello: Hello) -> bytes:
    """Return the first bytes that the end that opened the link sends."""
    return _HELLO.pack(b"PMHI", VERSION, hello.link_id, hello.nonce, hello.proof)


def decode_hello(block: bytes | bytearray) -> Hello:
    """Return what HELLO_SIZE bytes say. Raises MalformedMessage."""
    magic, version, link_id, nonce, proof = _HELLO.unpack(block)
    if magic != b"PMHI" or version != VERSION:
        raise MalformedMessage("The first bytes of the connection are no hello of this version of the protocol.")
    return Hello(link_id, nonce, proof)


def encode_welcome(proof: bytes) -> bytes:
    """Return the answer to a good hello; a bad one is answered by the end of the connection."""
    return _WELCOME.pack(b"PMWE", VERSION, proof)


def check_welcome(block: bytes | bytearray, proofs: Proofs) -> None:
    """Return where WELCOME_SIZE bytes are of the link's serving end. Raises MalformedMessage."""
    if not hmac.compare_digest(bytes(block), encode_welcome(proofs.welcome)):
        raise MalformedMessage("what answers there does not know the link's secret")
