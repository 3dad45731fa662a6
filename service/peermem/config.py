"""The daemon's configuration, and the only reader of the environment.

Rules of this file:

* One strict TOML file, then PEERMEM_ variables on top: PEERMEM_NODE, PEERMEM_GRPC_ADDRESS. Text,
  sizes and durations are written there as they are; numbers, switches, lists and tables as TOML.
* Whatever is wrong is refused at start, all of it at once: where it stands, its key, its value, and
  what was expected. What passed is used as it is, nobody checks it again.
* A size without a unit is in bytes. A duration needs its unit. Empty text is None where that is allowed.
* `deploy/peermem.toml` shows every option with its default; a test compares the two.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import msgspec
from msgspec import Meta, Struct

from peermem import strict_toml
from peermem.core.errors import InvalidField
from peermem.core.names import check_id
from peermem.core.node import ADOPTED
from peermem.core.units import parse_duration, parse_size
from peermem.strict_toml import ConfigError as ConfigError
from peermem.strict_toml import Contradiction

DEFAULT_PATH = Path("/etc/peermem/peermem.toml")
PREFIX = "PEERMEM_"
CLIENT_VARIABLES = frozenset({"PEERMEM_TARGET"})
"""Variables of the client library, which a daemon's environment may hold as well."""


class Name(str):
    """The short name of a node or device."""

    __slots__ = ()
    expected: ClassVar[str] = "1 to 63 of a-z, 0-9 and -, starting with a letter and not ending with -"

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        try:
            return super().__new__(cls, check_id(text, "name"))
        except InvalidField as error:
            raise ValueError(error.message) from None


class SocketPath(str):
    """A unix socket."""

    __slots__ = ()
    expected: ClassVar[str] = "an absolute path of at most 107 bytes"

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not text.startswith("/") or "\0" in text or len(text.encode()) > 107:
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class Address(str):
    """host:port of a server to connect to; the host is a name, an IPv4 or an [IPv6] address."""

    __slots__ = ()
    expected: ClassVar[str] = 'host:port with a port from 1 to 65535, such as "10.0.0.2:7470" or "[fd00::2]:7470"'
    lowest_port: ClassVar[int] = 1
    _HOST: ClassVar[re.Pattern[str]] = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", re.ASCII)

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not cls._is_valid(text):
            raise ValueError(cls.expected)
        return super().__new__(cls, text)

    @classmethod
    def _is_valid(cls, text: str) -> bool:
        host, _, port = text.rpartition(":")
        if not re.fullmatch(r"0|[1-9]\d{0,4}", port, re.ASCII) or not cls.lowest_port <= int(port) <= 65535:
            return False
        if host.startswith("[") and host.endswith("]"):
            return isinstance(_ip(host[1:-1]), IPv6Address)
        looks_like_ipv4 = not host.strip("0123456789.")
        return isinstance(_ip(host), IPv4Address) if looks_like_ipv4 else bool(cls._HOST.fullmatch(host))

    @property
    def host(self) -> str:
        """Without brackets."""
        return self.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """0 for any free one."""
        return int(self.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it."""
        ip = _ip(self.host)
        return ip.is_loopback if ip else self.host == "localhost"

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every address of this host, so that no other host can use it."""
        ip = _ip(self.host)
        return bool(ip and ip.is_unspecified)


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class ListenAddress(Address):
    """host:port to serve on; port 0 takes any free one."""

    __slots__ = ()
    expected: ClassVar[str] = 'host:port with a port from 0 to 65535, such as "127.0.0.1:7470" or "[::1]:7470"'
    lowest_port: ClassVar[int] = 0


class Size(int):
    """Bytes. Subclasses set the bounds."""

    _bounds: ClassVar[tuple[int, int]]
    expected: ClassVar[str]

    def __init_subclass__(cls, least: str, most: str) -> None:
        cls._bounds = parse_size(least), parse_size(most)
        cls.expected = f'a size from {least} to {most} in bytes, KiB, MiB, GiB or TiB, such as "64MiB"'

    def __new__(cls, value: str | int) -> Self:
        """Raises ValueError."""
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(cls.expected)
        size = parse_size(value)
        if not cls._bounds[0] <= size <= cls._bounds[1]:
            raise ValueError(cls.expected)
        return super().__new__(cls, size)


class Duration(float):
    """Seconds. Subclasses set the bounds."""

    _bounds: ClassVar[tuple[float, float]]
    expected: ClassVar[str]

    def __init_subclass__(cls, least: str, most: str) -> None:
        cls._bounds = parse_duration(least), parse_duration(most)
        cls.expected = f'a duration with its unit (ms, s, min, h, d) from {least} to {most}, such as "30s"'

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not isinstance(text, str):
            raise ValueError(cls.expected)
        seconds = parse_duration(text)
        if not cls._bounds[0] <= seconds <= cls._bounds[1]:
            raise ValueError(cls.expected)
        return super().__new__(cls, seconds)


class MessageSize(Size, least="64KiB", most="1GiB"):
    """Of one gRPC message."""


class AdoptSize(Size, least="0B", most="1024TiB"):
    """Of all memory that jobs hand in."""


class DeviceSize(Size, least="4KiB", most="1024TiB"):
    """Of a device."""


class Wait(Duration, least="100ms", most="1h"):
    """Until something is given up."""


class Keep(Duration, least="0s", most="7d"):
    """How long something that nobody uses is kept."""


Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Rails = Annotated[int, Meta(ge=1, le=16)]


class Grpc(Struct, frozen=True, forbid_unknown_fields=True):
    """The gRPC server."""

    socket: SocketPath | None = SocketPath("/run/peermem/peermem.sock")
    """Where local jobs connect; None: nowhere."""
    address: ListenAddress | None = ListenAddress("127.0.0.1:7470")
    """Where other nodes and remote jobs connect; None: nowhere."""
    advertise: Address | None = None
    """What other nodes are told; None: `address`."""
    reflection: bool = False
    """Let callers ask for the contract."""
    max_message: MessageSize = MessageSize("4MiB")
    """Of one message, both ways."""
    max_concurrent_calls: Count = 8192
    """Calls beyond it are refused."""


class Attach(Struct, frozen=True, forbid_unknown_fields=True):
    """The attach socket, over which file descriptors pass."""

    socket: SocketPath | None = SocketPath("/run/peermem/attach.sock")
    """None: it is not served."""
    adopt_limit: AdoptSize = AdoptSize("1GiB")
    """All memory together that jobs may hand in."""
    max_sessions: Count = 1024
    """Jobs attached at the same time."""


class Http(Struct, frozen=True, forbid_unknown_fields=True):
    """Health, readiness and metrics."""

    address: ListenAddress | None = ListenAddress("127.0.0.1:7472")
    """None: it is not served."""


class Tcp(Struct, frozen=True, forbid_unknown_fields=True):
    """The tcp fabric."""

    address: ListenAddress = ListenAddress("127.0.0.1:7471")
    """Where other nodes' links connect."""
    advertise: Address | None = None
    """What other nodes are told; None: `address`."""
    rails: Rails = 2
    """Connections of one link."""
    stall_timeout: Wait = Wait("10s")
    """A link on which nothing moves for so long, while work is outstanding, is broken."""


class Transfer(Struct, frozen=True, forbid_unknown_fields=True):
    """Transfers."""

    max_running: Count = 4096
    """Transfers at the same time."""
    max_segments: Count = 131072
    """Of one transfer."""
    keep_ended: Count = 4096
    """Ended transfers that can still be asked for."""
    keep_ended_for: Keep = Keep("10min")
    """How long they can be."""
    grant_ttl: Wait = Wait("30s")
    """What a grant lasts unless it is used again."""
    link_idle: Keep = Keep("60s")
    """A link that nobody uses is closed after this."""


class Region(Struct, frozen=True, forbid_unknown_fields=True):
    """Regions."""

    max_regions: Count = 65536
    """Regions at the same time."""


class Device(Struct, frozen=True, forbid_unknown_fields=True):
    """Memory that regions are made of."""

    name: Name
    """Unique on the node."""
    size: DeviceSize
    """Bytes in all."""
    kind: Literal["memfd"] = "memfd"
    """What it is."""


class Directory(Struct, frozen=True, forbid_unknown_fields=True):
    """Where nodes find each other."""

    kind: Literal["static"] = "static"
    """Which directory."""
    nodes: Mapping[Name, Address] = {}
    """gRPC address of each node by its short name; this node may be among them."""


class Shutdown(Struct, frozen=True, forbid_unknown_fields=True):
    """The end of the daemon."""

    grace: Keep = Keep("20s")
    """What running transfers get to end."""


class Log(Struct, frozen=True, forbid_unknown_fields=True):
    """Logs, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Nothing below it is written."""
    format: Literal["auto", "text", "json"] = "auto"
    """auto: text on a terminal, else json."""


def node_name(host: str) -> Name:
    """Return the node name for a host's name: its first label, with what a name can't hold as -."""
    label = re.sub(r"[^a-z0-9-]", "-", host.split(".")[0].lower()).strip("-")
    name = label if label[:1].isalpha() else f"node-{label}".rstrip("-")
    return Name(name[:63].rstrip("-"))


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that the daemon can be told."""

    node: Name = msgspec.field(default_factory=lambda: node_name(socket.gethostname()))
    """This node's short name."""
    insecure_network: bool = False
    """Serve on addresses that other hosts reach, although TCP has no authentication yet."""
    grpc: Grpc = Grpc()
    attach: Attach = Attach()
    http: Http = Http()
    tcp: Tcp = Tcp()
    transfer: Transfer = Transfer()
    region: Region = Region()
    devices: tuple[Device, ...] = msgspec.field(default=(Device(Name("memfd0"), DeviceSize("1GiB")),), name="device")
    directory: Directory = Directory()
    shutdown: Shutdown = Shutdown()
    log: Log = Log()


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Return the configuration of a file (None: the default one, if it is there) and the environment.

    Raises ConfigError.
    """
    file = path or DEFAULT_PATH
    try:
        table = strict_toml.read_file(file)
    except FileNotFoundError:
        if path:
            raise ConfigError([f"{path}: there is no such file. Write it, or leave --config out."]) from None
        table = {}
    variables = {
        name: text for name, text in environ.items() if name.startswith(PREFIX) and name not in CLIENT_VARIABLES
    }
    return strict_toml.build(Config, table, file, variables, PREFIX, _contradictions)


def _contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield what is wrong between values that are valid one by one."""
    if not config.grpc.socket and not config.grpc.address:
        yield "grpc", "grpc.socket and grpc.address are both empty, so nobody could reach the daemon. Set one of them."
    if config.grpc.socket and config.grpc.socket == config.attach.socket:
        yield "attach.socket", "attach.socket is the same path as grpc.socket. Give each its own."
    names = [device.name for device in config.devices]
    if ADOPTED in names:
        yield "device", f"device has the name {ADOPTED}, which stands for memory that jobs hand in. Choose another."
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield "device", f"device has the name {name} more than once. Give each device its own."
    for section, server in (("grpc", config.grpc), ("tcp", config.tcp), ("http", config.http)):
        address = server.address
        if address and not address.is_loopback and not config.insecure_network:
            yield f"{section}.address", _EXPOSED.format(section=section, address=address)
        if address and address.is_wildcard and isinstance(server, (Grpc, Tcp)) and not server.advertise:
            yield f"{section}.advertise", _NOWHERE.format(section=section, address=address)


_EXPOSED = (
    "{section}.address {address} can be reached from other hosts, and there is no authentication on TCP yet: "
    "whoever reaches it is let in. Use a loopback address such as 127.0.0.1 or, on a network that keeps "
    "strangers out, set insecure_network = true."
)
_NOWHERE = (
    "{section}.advertise is empty while {section}.address is {address}, which other nodes can't connect to. "
    "Set it to the host:port at which they reach this node."
)
