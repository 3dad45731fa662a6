"""Daemons as processes of their own that prove to each other who they are."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.daemons import Daemon, Place, daemons
from click.testing import CliRunner

import peermem
from peermem import errors
from peermem.cli import tool
from tests.certificates import PATTERN, Authority
from tests.e2e.conftest import DEVICE, check_log
from tests.e2e.support import MIB, eventually, noise

AUTHORITY = Authority()
NODES = ("a", "b", "c")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    folder = tmp_path_factory.mktemp("tls")
    places = {node: Place(config=table(AUTHORITY.node(node).write(folder / f"tls-{node}"))) for node in NODES}
    with daemons(folder, NODES, DEVICE, places=places) as nodes:
        yield nodes
        for daemon in nodes.values():
            assert daemon.stop() == 0
            check_log(daemon)


def table(files: Path) -> str:
    named = {"certificate": "cert.pem", "key": "key.pem", "ca": "ca.pem"}
    lines = [f'{name} = "{files / file}"' for name, file in named.items()]
    return "\n".join(("[tls]", *lines, f'nodes = "{PATTERN}"'))


def files(daemon: Daemon) -> Path:
    return daemon.folder.parent / f"tls-{daemon.node}"


def cross(trio: dict[str, Daemon], seed: int) -> None:
    """Move bytes from a to b by order of c, and back by order of b."""
    data = noise(MIB, seed)
    with (
        peermem.connect(trio["a"].target) as a,
        peermem.connect(trio["b"].target) as b,
        peermem.connect(trio["c"].target) as c,
        a.create_region(device="bar0", length=MIB) as source,
        b.create_region(device="bar0", length=MIB) as sink,
        a.create_region(device="bar0", length=MIB) as back,
    ):
        source.map()[:] = data
        assert c.transfer(source, sink, checksum=True).wait("30s").state == "SUCCEEDED"
        assert b.transfer(sink, back, checksum=True).wait("30s").state == "SUCCEEDED"
        assert bytes(back.map()) == data


def test_bytes_cross_by_anybodys_order_also_after_a_kill_and_new_certificates(trio: dict[str, Daemon]) -> None:
    cross(trio, 1)
    b = trio["b"]
    b.kill()
    AUTHORITY.node("b").write(files(b))
    b.start()
    b.ready()
    cross(trio, 2)


def test_the_tool_measures_over_tls(trio: dict[str, Daemon], tmp_path: Path) -> None:
    shown = AUTHORITY.issue("spiffe://example.org/job/bench").write(tmp_path / "job")
    named = {"CA": "ca.pem", "CERTIFICATE": "cert.pem", "KEY": "key.pem"}
    environ = {f"PEERMEM_CLIENT_{name}": str(shown / file) for name, file in named.items()}
    environ["PEERMEM_CLIENT_SERVER"] = "peermem.test"
    words = ("bench", "--iterations", "2", "--sizes", "4KiB", "--json", "--target", trio["a"].grpc)
    done = CliRunner().invoke(tool, words, env=environ)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["round_trip"]["p50"] > 0


def test_a_stranger_gets_nothing_and_leaves_no_line_in_the_log(trio: dict[str, Daemon], tmp_path: Path) -> None:
    a = trio["a"]
    host, _, port = a.grpc.partition(":")
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=20) as stranger:
            stranger.sendall(data)
            while stranger.recv(4096):
                pass
    foreign = Authority("another authority").issue("spiffe://example.org/job/7").write(tmp_path / "foreign")
    shown = peermem.Tls(
        ca=files(a) / "ca.pem", certificate=foreign / "cert.pem", key=foreign / "key.pem", server="peermem.test"
    )
    for tls in (shown, None):
        with pytest.raises(errors.NodeUnreachable):
            peermem.connect(a.grpc, tls=tls)
    log = a.log.read_text()
    assert "PRIVATE" not in log
    assert all(json.loads(line)["level"] in ("info", "warning") for line in log.splitlines())


def test_a_new_certificate_is_told_in_the_log(trio: dict[str, Daemon]) -> None:
    AUTHORITY.node("c").write(files(trio["c"]))
    eventually(lambda: "certificate_in_force" in trio["c"].log.read_text(), "the new certificate")
    cross(trio, 3)
