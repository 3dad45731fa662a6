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

import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from peermem import strict_toml
from peermem.config_devices import AnyDevice as AnyDevice
from peermem.config_devices import BarRange as BarRange
from peermem.config_devices import Cuda as Cuda
from peermem.config_devices import Memfd as Memfd
from peermem.config_devices import PciResource as PciResource
from peermem.config_devices import Rocm as Rocm
from peermem.config_devices import Udmabuf as Udmabuf
from peermem.config_devices import Vfio as Vfio
from peermem.config_devices import device_contradictions
from peermem.config_directory import Directory as Directory
from peermem.config_directory import Etcd as Etcd
from peermem.config_directory import directory_contradictions
from peermem.config_trust import Kubernetes as Kubernetes
from peermem.config_trust import Tls as Tls
from peermem.config_trust import trust_contradictions
from peermem.config_values import (
    AckTimeout,
    AdoptSize,
    BlockSize,
    CollectorUrl,
    Failpoint,
    FilePath,
    HostName,
    Keep,
    MessageSize,
    NicName,
    Share,
    Wait,
)
from peermem.config_values import Address as Address
from peermem.config_values import DeviceSize as DeviceSize
from peermem.config_values import ListenAddress as ListenAddress
from peermem.config_values import Name as Name
from peermem.config_values import SocketPath as SocketPath
from peermem.strict_toml import ConfigError as ConfigError
from peermem.strict_toml import Contradiction
from peermem.supervisor import Given

DEFAULT_PATH = Path("/etc/peermem/peermem.toml")
PREFIX = "PEERMEM_"
CLIENT_VARIABLES = frozenset(
    {"PEERMEM_TARGET", *(f"PEERMEM_CLIENT_{name}" for name in ("CA", "CERTIFICATE", "KEY", "TOKEN_FILE", "SERVER"))}
)
"""Variables of the client library, which a daemon's environment may hold as well."""


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
    token_address: ListenAddress | None = None
    """Where remote jobs without a certificate connect, over TLS; None: nowhere."""
    reflection: bool = False
    """Let callers ask for the contract."""
    max_message: MessageSize = MessageSize("4MiB")
    """Of one message, both ways."""
    max_concurrent_calls: Count = 8192
    """Calls beyond it are refused."""
    max_connections: Count = 4096
    """Of one TCP port or the unix socket; more are closed at once."""
    handshake_timeout: Wait = Wait("10s")
    """What a connection has to be made."""


class Attach(Struct, frozen=True, forbid_unknown_fields=True):
    """The attach socket, over which file descriptors pass."""

    socket: SocketPath | None = SocketPath("/run/peermem/attach.sock")
    """None: it is not served."""
    adopt_limit: AdoptSize = AdoptSize("1GiB")
    """All memory together that jobs may hand in."""
    max_sessions: Count = 1024
    """Jobs attached at the same time."""


class Http(Struct, frozen=True, forbid_unknown_fields=True):
    """Health, readiness, metrics and the page."""

    address: ListenAddress | None = ListenAddress("127.0.0.1:7472")
    """None: it is not served."""
    page: Literal["loopback", "everyone", "off"] = "loopback"
    """Who gets the page, which names regions and owners: callers of this host, whoever reaches the port, or nobody."""
    names: tuple[HostName, ...] = ()
    """Under which browsers may ask for the page, besides localhost and the address that they reach."""


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


class Verbs(Struct, frozen=True, forbid_unknown_fields=True):
    """The verbs fabric."""

    nics: tuple[NicName, ...] = ()
    """RDMA devices or ports to use; empty: all."""
    queue_pairs: Annotated[int, Meta(ge=1, le=8)] = 1
    """Of one link between two NIC ports."""
    mtu: Literal[0, 256, 512, 1024, 2048, 4096] = 0
    """Bytes of payload in one packet, at most; 0: what the port has."""
    gid_index: Annotated[int, Meta(ge=-1, le=65535)] = -1
    """Which address of a port to use; -1: chosen by type and subnet."""
    ack_timeout: AckTimeout = AckTimeout("270ms")
    """Until a packet that was not acknowledged is sent again; NICs know only 4.096 us times a power of two."""
    retries: Annotated[int, Meta(ge=1, le=6)] = 6
    """How often it is sent again, before the link is broken."""
    traffic_class: Annotated[int, Meta(ge=0, le=255)] = 0
    """Of the packets' IP header."""
    service_level: Annotated[int, Meta(ge=0, le=15)] = 0
    """Of the packets, on InfiniBand and for priority flow control."""
    hop_limit: Annotated[int, Meta(ge=1, le=255)] = 64
    """Routers that a packet passes, at most."""
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
    """What a grant lasts at most; a transfer that takes longer has it renewed."""
    link_idle: Keep = Keep("60s")
    """A link that nobody uses is closed after this."""
    retry_for: Keep = Keep("10s")
    """How long a transfer tries to get a link, or to go on after one broke, while nothing moves."""


class Region(Struct, frozen=True, forbid_unknown_fields=True):
    """Regions."""

    max_regions: Count = 65536
    """Regions at the same time."""


class StorageDirectory(Struct, frozen=True, forbid_unknown_fields=True):
    """A place that loads and stores may use."""

    path: FilePath
    """Of a directory, or of a single file or block device."""
    write: bool = False
    """Whether stores may use it."""


class Storage(Struct, frozen=True, forbid_unknown_fields=True):
    """Loads and stores: files and block devices into regions and back."""

    directories: tuple[StorageDirectory, ...] = ()
    """The only places that they may use."""
    block: BlockSize = BlockSize("1MiB")
    """What they go by."""
    depth: Annotated[int, Meta(ge=1, le=64)] = 8
    """Blocks of one load or store that are under way at the same time."""
    max_running: Annotated[int, Meta(ge=1, le=64)] = 8
    """Loads and stores at the same time."""


class Policy(Struct, frozen=True, forbid_unknown_fields=True):
    """Who may do what."""

    file: FilePath | None = None
    """None: there is none, and `without_file` holds."""
    without_file: Literal["auto", "open", "own"] = "auto"
    """open: whoever reaches the daemon uses every region; own: each subject its own; auto: open where only this host
    reaches it over gRPC, else own."""


class Audit(Struct, frozen=True, forbid_unknown_fields=True):
    """The audit log."""

    file: FilePath | None = None
    """None: where all logs go."""
    decisions: Literal["auto", "all", "denied"] = "auto"
    """Which decisions of the policy it holds; auto: all where there is a policy file, else what was denied."""


class Tracing(Struct, frozen=True, forbid_unknown_fields=True):
    """Spans of what the daemon does."""

    endpoint: CollectorUrl | None = None
    """None: none are made."""
    sample: Share = Share(0.01)
    """Share of the traces that begin here which are kept; of those that a caller began it decided."""


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
    """Serve gRPC without TLS on addresses that other hosts reach: whoever reaches them may do everything."""
    fabric: Literal["auto", "verbs", "tcp"] = "auto"
    """How bytes cross to other nodes; auto: verbs where both ends have a working NIC, else tcp."""
    p2pmem: bool = True
    """Make a device of each p2pmem pool on the node."""
    break_on_purpose: bool = False
    """This daemon is there to be tested: it may be told to fail, to lose bytes and to die."""
    failpoints: tuple[Failpoint, ...] = ()
    """What goes wrong in it, and where."""
    grpc: Grpc = Grpc()
    attach: Attach = Attach()
    http: Http = Http()
    tls: Tls = Tls()
    kubernetes: Kubernetes = Kubernetes()
    tcp: Tcp = Tcp()
    verbs: Verbs = Verbs()
    transfer: Transfer = Transfer()
    region: Region = Region()
    storage: Storage = Storage()
    policy: Policy = Policy()
    audit: Audit = Audit()
    devices: tuple[AnyDevice, ...] = msgspec.field(default=(Memfd(Name("memfd0"), DeviceSize("1GiB")),), name="device")
    directory: Directory = Directory()
    tracing: Tracing = Tracing()
    shutdown: Shutdown = Shutdown()
    log: Log = Log()

    @property
    def is_open_without_policy(self) -> bool:
        """Whether everybody may use every region as long as there is no policy file."""
        addresses = (self.grpc.address, self.grpc.token_address)
        here_only = all(address is None or address.is_loopback for address in addresses)
        return self.policy.without_file == "open" or (self.policy.without_file == "auto" and here_only)


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


def given_by_manager(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> Given:
    """Return what a service manager says in the environment of the process `pid`, this one if None."""
    own = str(os.getpid() if pid is None else pid)
    watchdog = environ.get("WATCHDOG_USEC", "") if environ.get("WATCHDOG_PID", own) == own else ""
    sockets = environ.get("LISTEN_FDS", "") if environ.get("LISTEN_PID") == own else ""
    return Given(
        environ.get("NOTIFY_SOCKET", ""),
        int(watchdog) / 1e6 if watchdog.isdecimal() else 0.0,
        int(sockets) if sockets.isdecimal() else 0,
    )


def _contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield what is wrong between values that are valid one by one."""
    if not config.grpc.socket and not config.grpc.address:
        yield "grpc", "grpc.socket and grpc.address are both empty, so nobody could reach the daemon. Set one of them."
    if config.grpc.socket and config.grpc.socket == config.attach.socket:
        yield "attach.socket", "attach.socket is the same path as grpc.socket. Give each its own."
    yield from device_contradictions(config.devices)
    yield from directory_contradictions(config.directory)
    yield from trust_contradictions(config.tls, config.kubernetes, config.grpc.token_address)
    if config.insecure_network and config.tls.on:
        yield (
            "insecure_network",
            "insecure_network is true although [tls] is set, which replaces it. Remove it.",
        )
    folders = [folder.path for folder in config.storage.directories]
    for path in sorted({path for path in folders if folders.count(path) > 1}):
        yield "storage.directories", f"storage.directories has {path} more than once. Leave one."
    if config.failpoints and not config.break_on_purpose:
        yield "failpoints", _UNBROKEN
    for section, server in (("grpc", config.grpc), ("tcp", config.tcp), ("http", config.http)):
        address = server.address
        if address and not address.is_loopback and not config.insecure_network and not config.tls.on:
            yield f"{section}.address", _EXPOSED.format(section=section, address=address)
        if address and address.is_wildcard and isinstance(server, (Grpc, Tcp)) and not server.advertise:
            yield f"{section}.advertise", _NOWHERE.format(section=section, address=address)


_EXPOSED = (
    "{section}.address {address} can be reached from other hosts, and without TLS whoever reaches it can read, write "
    "and delete everything. Set [tls], use a loopback address such as 127.0.0.1 or, on a network of nothing but "
    "trusted hosts, set insecure_network = true."
)
_UNBROKEN = (
    "failpoints make this daemon fail, lose bytes or die, and break_on_purpose is false. Remove them or, in a test, "
    "set break_on_purpose = true."
)
_NOWHERE = (
    "{section}.advertise is empty while {section}.address is {address}, which other nodes can't connect to. "
    "Set it to the host:port at which they reach this node."
)
