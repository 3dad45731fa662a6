"""Whole daemons in this process that believe an authority of the test's own, and callers that show certificates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import msgspec
from bench.daemons import free_ports as free_ports

from peermem.app import App
from peermem.client.errors import from_call
from peermem.config import (
    Address,
    Attach,
    Config,
    DeviceSize,
    Directory,
    Grpc,
    Http,
    ListenAddress,
    Memfd,
    Name,
    SocketPath,
    Tcp,
    Tls,
)
from peermem.config_values import FilePath, NodeIds
from peermem.core.errors import PeermemError
from peermem.credentials.trial import Pair
from tests.certificates import PATTERN, Authority, Certificate


class Node:
    """One daemon, and where it keeps what."""

    def __init__(self, name: str, folder: Path, port: int, authority: Authority) -> None:
        self.name = name
        self.folder = folder
        self.address = f"127.0.0.1:{port}"
        self.target = f"unix://{folder}/peermem.sock"
        self.authority = authority
        self.files = authority.node(name).write(folder / "tls")
        self.denied = folder / "denied"
        self.denied.write_text("# nobody\n")
        self.app: App | None = None

    def config(
        self,
        others: dict[str, str],
        *,
        token_address: ListenAddress | None = None,
        anonymous: bool = False,
        limits: Mapping[str, Any] = MappingProxyType({}),
        **changes: Any,
    ) -> Config:
        plain = Config(
            node=Name(self.name),
            grpc=Grpc(
                socket=SocketPath(f"{self.folder}/peermem.sock"),
                address=ListenAddress(self.address),
                token_address=token_address,
                **limits,
            ),
            attach=Attach(socket=SocketPath(f"{self.folder}/attach.sock")),
            http=Http(address=None),
            tcp=Tcp(address=ListenAddress("127.0.0.1:0")),
            tls=self.tls(anonymous=anonymous),
            devices=(Memfd(Name("bar0"), DeviceSize("64MiB")),),
            directory=Directory(nodes={Name(name): Address(address) for name, address in others.items()}),
            fabric="tcp",
            p2pmem=False,
        )
        return msgspec.structs.replace(plain, **changes)

    def tls(self, **changes: Any) -> Tls:
        return msgspec.structs.replace(self._tls, **changes)

    @property
    def _tls(self) -> Tls:
        files = {name: FilePath(str(self.files / f"{name}.pem")) for name in ("cert", "key", "ca")}
        return Tls(
            certificate=files["cert"],
            key=files["key"],
            ca=files["ca"],
            nodes=NodeIds(PATTERN),
            denied=FilePath(str(self.denied)),
        )


@asynccontextmanager
async def nodes(folder: Path, names: Sequence[str], authority: Authority, **changes: Any) -> AsyncIterator[list[Node]]:
    """Run a daemon for each name, each of which knows the others."""
    made = []
    for name, port in zip(names, free_ports(len(names)), strict=True):
        (folder / name).mkdir()
        made.append(Node(name, folder / name, port, authority))
    async with AsyncExitStack() as stack:
        for node in made:
            others = {other.name: other.address for other in made if other is not node}
            node.app = App(node.config(others, **changes))
            await node.app.start()
            stack.push_async_callback(node.app.stop)
        yield made


@asynccontextmanager
async def caller(node: Node, shown: Certificate | None, address: str = "") -> AsyncIterator[grpc.aio.Channel]:
    """Connect as who shows a certificate, or none."""
    credentials = grpc.ssl_channel_credentials(
        node.authority.pem, shown.key if shown else None, shown.pem if shown else None
    )
    options = (("grpc.ssl_target_name_override", "peermem.test"),)
    async with grpc.aio.secure_channel(address or node.address, credentials, options=options) as channel:
        yield channel


def fault(error: grpc.aio.AioRpcError) -> PeermemError:
    return from_call(error, "the daemon")


def with_roots(pair: Pair, *authorities: Authority) -> Pair:
    """Return a pair that believes these authorities."""
    return replace(pair, roots=b"".join(authority.pem for authority in authorities))
