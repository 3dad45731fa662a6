from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Mode, Network, Wire, network

BULK = 60_000
"""Bytes that arrive in one piece."""


class Echo:
    """A server that says back what it hears."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self.listener.getsockname())
        self.heard: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    def _echo(self, sock: socket.socket) -> None:
        with sock:
            try:
                while data := sock.recv(4096):
                    self.heard.put(data)
                    sock.sendall(data)
            except ConnectionError:
                pass


@pytest.fixture
def wires() -> Iterator[Network]:
    with network() as wires:
        yield wires


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.listener.close()


@pytest.fixture
def wire(wires: Network, echo: Echo) -> Wire:
    return wires.wire(echo.address)


def dial(wire: Wire) -> socket.socket:
    host, _, port = wire.address.rpartition(":")
    return socket.create_connection((host, int(port)), 10)


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += sock.recv(count - len(data))
    return data


def check_silent(sock: socket.socket) -> None:
    """Assert that nothing comes."""
    sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        sock.recv(1)
    sock.settimeout(10)


def test_an_open_wire_passes_bytes_on(wire: Wire) -> None:
    with dial(wire) as sock:
        sock.sendall(b"hello")
        assert sock.recv(5, socket.MSG_WAITALL) == b"hello"


def test_a_stalled_wire_passes_nothing_on_until_it_is_open_again(wire: Wire) -> None:
    with dial(wire) as sock:
        sock.sendall(b"one")
        assert sock.recv(3, socket.MSG_WAITALL) == b"one"
        wire.set(Mode.STALLED)
        sock.sendall(b"two")
        with dial(wire) as late:
            late.sendall(b"three")
            for each in (sock, late):
                check_silent(each)
            wire.set(Mode.OPEN)
            assert sock.recv(3, socket.MSG_WAITALL) == b"two"
            assert late.recv(5, socket.MSG_WAITALL) == b"three"


def test_a_mute_wire_passes_nothing_back(wire: Wire, echo: Echo) -> None:
    with dial(wire) as sock:
        sock.sendall(b"one")
        assert sock.recv(3, socket.MSG_WAITALL) == b"one"
        assert echo.heard.get(timeout=10) == b"one"
        wire.set(Mode.MUTE)
        sock.sendall(b"two")
        assert echo.heard.get(timeout=10) == b"two"
        check_silent(sock)
        wire.set(Mode.OPEN)
        assert sock.recv(3, socket.MSG_WAITALL) == b"two"


def test_a_late_wire_passes_on_what_its_sender_has_given_up(wire: Wire, echo: Echo) -> None:
    with dial(wire) as sock:
        sock.sendall(b"one")
        assert sock.recv(3, socket.MSG_WAITALL) == b"one"
        assert echo.heard.get(timeout=10) == b"one"
        wire.set(Mode.LATE)
        sock.sendall(bytes(1 << 20))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with pytest.raises(queue.Empty):
        echo.heard.get(timeout=0.05)
    wire.set(Mode.OPEN)
    assert echo.heard.get(timeout=10).count(0) > 0


def test_a_wire_can_be_late_for_bulk_of_every_other_connection(wire: Wire) -> None:
    with dial(wire) as odd, dial(wire) as even:
        for sock in (odd, even):
            sock.sendall(b"one")
            assert sock.recv(3, socket.MSG_WAITALL) == b"one"
        wire.set(Mode.HALF_LATE)
        for sock in (odd, even):
            sock.sendall(b"two")
            assert sock.recv(3, socket.MSG_WAITALL) == b"two", "small pieces pass"
            sock.sendall(bytes(BULK))
        assert receive(even, BULK) == bytes(BULK)
        odd.settimeout(0.05)
        with pytest.raises(TimeoutError):
            odd.recv(1)
        odd.settimeout(10)
        wire.set(Mode.OPEN)
        assert receive(odd, BULK) == bytes(BULK)


def test_a_wire_that_is_cut_resets_what_is_on_it_and_what_comes(wire: Wire) -> None:
    with dial(wire) as sock:
        sock.sendall(b"one")
        assert sock.recv(3, socket.MSG_WAITALL) == b"one"
        wire.set(Mode.CUT)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        with pytest.raises(ConnectionResetError), dial(wire) as late:
            late.recv(1)
    wire.set(Mode.OPEN)
    with dial(wire) as sock:
        wire.reset()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_a_wire_that_leads_nowhere_resets(wires: Network) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nowhere = "{}:{}".format(*unused.getsockname())
    with pytest.raises(ConnectionResetError), dial(wires.wire(nowhere)) as sock:
        sock.recv(1)
