"""Another daemon, which runs in this process and is reached over gRPC."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest

from peermem.app import App
from peermem.config import Attach, Config, DeviceSize, Grpc, Http, ListenAddress, Memfd, Name, SocketPath, Tcp
from peermem.core import errors
from peermem.remote.client import GrpcRemotes

HERE = "a"


def config(node: str, grpc_port: int, socket_path: str | None = None) -> Config:
    return Config(
        node=Name(node),
        grpc=Grpc(
            socket=SocketPath(socket_path) if socket_path else None, address=ListenAddress(f"127.0.0.1:{grpc_port}")
        ),
        attach=Attach(socket=None),
        http=Http(address=None),
        tcp=Tcp(address=ListenAddress("127.0.0.1:0")),
        devices=(Memfd(Name("bar0"), DeviceSize("1MiB")),),
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Other:
    """Node b, which can be started and stopped."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.app: App | None = None

    async def start(self) -> None:
        self.app = App(config("b", self.port))
        await self.app.start()

    async def stop(self) -> None:
        if self.app is not None:
            await self.app.stop()
            self.app = None


@pytest.fixture
async def other() -> AsyncIterator[Other]:
    other = Other()
    yield other
    await other.stop()


@pytest.fixture
async def remotes(other: Other) -> AsyncIterator[GrpcRemotes]:
    def address(node: str) -> str:
        if node != "b":
            raise errors.NodeNotFound("The directory does not know it.", node=node)
        return other.address

    remotes = GrpcRemotes(HERE, "epoch-of-a", address)
    yield remotes
    await remotes.close()
