"""Keys and values in etcd: JSON objects that any program may read, below one prefix of one cluster.

    PREFIX/CLUSTER/nodes/NODE                             a node
    PREFIX/CLUSTER/regions/NODE/REGION                    a published region
    PREFIX/CLUSTER/labels/KEY=VALUE/NODE/REGION           the same once more for each of its labels

Rules of this file:

* Every value has `v`, which grows only when older daemons could misread it. Fields may be added without: whoever does
  not know one leaves it out.
* Whoever can write there may be hostile: what is read is bounded and checked, and what makes no sense is a BadRecord.
  No text of a node can hold control characters; keys and values of labels are quoted in keys.
* Words that many nodes share are kept once: a daemon keeps thousands of entries.
* No keys, tokens, clients' names or bytes of regions are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from sys import intern
from typing import Annotated, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct

from peermem.config_values import Address
from peermem.core.errors import InvalidField
from peermem.core.names import ChildName, check_id
from peermem.core.node import NodeDevice
from peermem.core.region import PublishedRegion
from peermem.core.types import FabricKind, Path
from peermem.directory.base import NodeEntry
from peermem.wire import labels_from_proto

_S = TypeVar("_S")
VERSION = 1
_MAX_VALUE = 64 << 10
"""Bytes."""

_Word = Annotated[str, Meta(max_length=255, pattern=r"^[!-~]*\Z")]
_Bytes = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class BadRecord(Exception):
    """A key or value that makes no sense; the text says why."""


class _Versioned(Struct):
    v: int


class _Device(Struct):
    name: _Word
    kind: _Word
    size: _Bytes


class _Node(Struct):
    v: int
    address: _Word
    machine: _Word = ""
    epoch: _Word = ""
    version: _Word = ""
    fabrics: Annotated[list[_Word], Meta(max_length=16)] = []
    nics: Annotated[list[_Word], Meta(max_length=256)] = []
    devices: Annotated[list[_Device], Meta(max_length=512)] = []


class _Region(Struct):
    v: int
    length: _Bytes
    device_kind: _Word
    path: _Word
    labels: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node and what tells its host from another one of the same address."""

    entry: NodeEntry
    machine: str = ""
    """Identifies the host's installation; empty where it has no such thing."""

    def is_same_host(self, other: NodeRecord) -> bool:
        """Whether it is at the same address, on the same installation."""
        return self.entry.address == other.entry.address and self.machine == other.machine


class Span(NamedTuple):
    """A range of keys: all that begin with `start`."""

    start: bytes
    end: bytes


class Keys:
    """The keys of one cluster."""

    def __init__(self, prefix: str, cluster: str) -> None:
        root = f"{prefix}/{cluster}"
        self._nodes = f"{root}/nodes/"
        self._regions = f"{root}/regions/"
        self._labels = f"{root}/labels/"
        self.nodes = _span(self._nodes)
        self.regions = _span(self._regions)

    def node(self, node: str) -> bytes:
        """Return the key of a node."""
        return f"{self._nodes}{node}".encode()

    def node_of(self, key: bytes) -> str:
        """Return the node of a key. Raises BadRecord."""
        return _id(key.removeprefix(self.nodes.start))

    def of_label(self, key: str, value: str) -> Span:
        """Return where the regions are that carry a label."""
        return _span(f"{self._labels}{quote(key, safe='')}={quote(value, safe='')}/")

    def behind(self, span: Span, name: ChildName) -> bytes:
        """Return the first key behind a region's in a span of regions."""
        return span.start + f"{name.node}/{name.id}".encode() + b"\0"

    def of_region(self, region: PublishedRegion) -> list[bytes]:
        """Return all keys of a region."""
        spans = [self.regions, *(self.of_label(*label) for label in region.labels.items())]
        return [span.start + f"{region.name.node}/{region.name.id}".encode() for span in spans]

    def region_of(self, span: Span, key: bytes) -> ChildName:
        """Return the region of a key in a span of regions. Raises BadRecord."""
        node, _, region = key.removeprefix(span.start).partition(b"/")
        return ChildName(_id(node), "regions", _id(region))


def write_node(record: NodeRecord) -> bytes:
    """Return the value for a node."""
    entry = record.entry
    return _ENCODER.encode(
        _Node(
            v=VERSION,
            address=entry.address,
            machine=record.machine,
            epoch=entry.epoch,
            version=entry.version,
            fabrics=[kind.value for kind in entry.fabrics],
            nics=list(entry.nics),
            devices=[_Device(device.name, device.kind, device.size) for device in entry.devices],
        )
    )


def read_node(node: str, value: bytes) -> NodeRecord:
    """Return the node of a value. Raises BadRecord."""
    found = _read(_READ_NODE, value)
    try:
        address = Address(found.address)
    except ValueError as error:
        raise BadRecord(f"its address is not {error}") from None
    kinds = {kind.value: kind for kind in FabricKind}
    entry = NodeEntry(
        node=node,
        address=address,
        epoch=found.epoch,
        version=intern(found.version),
        fabrics=tuple(kinds[name] for name in found.fabrics if name in kinds),
        nics=tuple(map(intern, found.nics)),
        devices=tuple(NodeDevice(intern(device.name), intern(device.kind), device.size) for device in found.devices),
    )
    return NodeRecord(entry, found.machine)


def write_region(region: PublishedRegion) -> bytes:
    """Return the value for a region."""
    return _ENCODER.encode(
        _Region(
            v=VERSION,
            length=region.length,
            device_kind=region.device_kind,
            path=region.path.value,
            labels=dict(region.labels),
        )
    )


def read_region(name: ChildName, value: bytes) -> PublishedRegion:
    """Return the region of a value. Raises BadRecord."""
    found = _read(_READ_REGION, value)
    try:
        labels = labels_from_proto(list(found.labels.items()))
        return PublishedRegion(name, found.length, found.device_kind, Path(found.path), labels)
    except (InvalidField, ValueError) as error:
        raise BadRecord(str(error)) from None


def _read(decoder: msgspec.json.Decoder[_S], value: bytes) -> _S:
    if len(value) > _MAX_VALUE:
        raise BadRecord(f"it has {len(value)} bytes, more than {_MAX_VALUE}")
    try:
        version = _READ_VERSION.decode(value).v
        if version != VERSION:
            raise BadRecord(f"it is of version {version}, and this daemon knows {VERSION}")
        return decoder.decode(value)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadRecord(str(error)) from None


def _id(text: bytes) -> str:
    try:
        return check_id(text.decode("ascii"), "key")
    except (InvalidField, UnicodeError):
        raise BadRecord("its key names no node or region") from None


def _span(start: str) -> Span:
    """All spans end with a slash, so that one of `a` holds nothing of `ab`."""
    return Span(start.encode(), start[:-1].encode() + b"0")


def _plain(value: object) -> object:
    """Return a configuration's text or number as what it is."""
    return int(value) if isinstance(value, int) else str(value)


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)
_READ_VERSION = msgspec.json.Decoder(_Versioned)
_READ_NODE = msgspec.json.Decoder(_Node)
_READ_REGION = msgspec.json.Decoder(_Region)
