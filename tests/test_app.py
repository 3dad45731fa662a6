"""The composition root: what is opened is closed, in order, also when a later step fails."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import grpc
import pytest

from peermem.app import App
from peermem.config import (
    Attach,
    Audit,
    Config,
    DeviceSize,
    Grpc,
    Http,
    ListenAddress,
    Memfd,
    Name,
    SocketPath,
    Tcp,
)
from peermem.config_values import FilePath
from peermem.v1 import node_pb2, node_pb2_grpc


def config(folder: Path, **changes: object) -> Config:
    anywhere = ListenAddress("127.0.0.1:0")
    settings: dict[str, object] = {
        "node": Name("a"),
        "grpc": Grpc(socket=SocketPath(f"{folder}/peermem.sock"), address=anywhere),
        "attach": Attach(socket=SocketPath(f"{folder}/attach.sock")),
        "http": Http(address=anywhere),
        "tcp": Tcp(address=anywhere),
        "devices": (Memfd(Name("bar0"), DeviceSize("1MiB")),),
    }
    return Config(**{**settings, **changes})  # type: ignore[arg-type]


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def answered(path: Path) -> str:
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        return (await node_pb2_grpc.NodeServiceStub(channel).GetNode(node_pb2.GetNodeRequest(), timeout=10)).name


async def test_it_starts_and_stops_and_leaves_no_socket(tmp_path: Path) -> None:
    app = App(config(tmp_path))
    await app.start()
    assert await answered(tmp_path / "peermem.sock") == "nodes/a"
    await app.stop()
    assert not (tmp_path / "attach.sock").exists()
    again = App(config(tmp_path))
    await again.start()
    assert await answered(tmp_path / "peermem.sock") == "nodes/a"
    await again.stop()


@pytest.mark.parametrize("section", ["grpc", "tcp", "http"])
async def test_what_was_opened_is_closed_when_a_port_is_taken(tmp_path: Path, section: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = ListenAddress(f"127.0.0.1:{taken.getsockname()[1]}")
        part = {"grpc": Grpc(socket=None, address=address), "tcp": Tcp(address=address), "http": Http(address=address)}
        with pytest.raises(OSError, match=str(address.port)):
            await App(config(tmp_path, **{section: part[section]})).start()
    assert not (tmp_path / "attach.sock").exists()
    app = App(config(tmp_path))
    await app.start()
    await app.stop()


async def test_a_file_in_the_sockets_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "attach.sock").write_text("somebody's notes")
    with pytest.raises(OSError, match="is no socket"):
        await App(config(tmp_path)).start()
    assert (tmp_path / "attach.sock").read_text() == "somebody's notes"


async def test_descriptors_return_to_their_number(tmp_path: Path) -> None:
    for count in range(3):
        app = App(config(tmp_path, grpc=Grpc(socket=None, address=ListenAddress("127.0.0.1:0"))))
        await app.start()
        await app.stop()
        await asyncio.sleep(0)
        if count == 0:
            before = descriptors()
    assert descriptors() <= before


async def test_an_audit_file_that_can_not_be_written_keeps_it_from_starting(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await App(config(tmp_path, audit=Audit(file=FilePath(f"{tmp_path}/none/audit.log")))).start()


async def test_its_audit_file_is_given_back(tmp_path: Path) -> None:
    before = descriptors()
    app = App(config(tmp_path, audit=Audit(file=FilePath(f"{tmp_path}/audit.log"))))
    await app.start()
    await app.stop()
    await asyncio.sleep(0)
    assert descriptors() <= before
    assert (tmp_path / "audit.log").exists()
