"""Where nodes find each other: a list in the configuration, or etcd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

from peermem.config_values import Address, FilePath, KeyPrefix, LeaseTime, Name, UserName
from peermem.strict_toml import Contradiction


class Etcd(Struct, frozen=True, forbid_unknown_fields=True):
    """The directory on etcd."""

    endpoints: tuple[Address, ...] = ()
    """host:port of each member; one that answers is used."""
    prefix: KeyPrefix = KeyPrefix("/peermem/v1")
    """What all keys begin with."""
    cluster: Name = Name("default")
    """Nodes of another cluster are never seen."""
    lease: LeaseTime = LeaseTime("15s")
    """After which a node that does not renew it is gone for the others."""
    max_published: Annotated[int, Meta(ge=0, le=65536)] = 1000
    """Published regions of this node at the same time."""
    ca: FilePath | None = None
    """PEM: the authorities of etcd's certificates; None: etcd is reached in the plain."""
    certificate: FilePath | None = None
    """PEM: what is shown to etcd, with its key; None: nothing."""
    key: FilePath | None = None
    """PEM: its key, without a password."""
    user: UserName | None = None
    """Of etcd; None: it asks for none."""
    password_file: FilePath | None = None
    """Its password."""


class Directory(Struct, frozen=True, forbid_unknown_fields=True):
    """Where nodes find each other."""

    kind: Literal["static", "etcd"] = "static"
    """Which directory."""
    nodes: Mapping[Name, Address] = {}
    """gRPC address of each node by its short name, for `static`; this node may be among them."""
    etcd: Etcd = Etcd()


def directory_contradictions(directory: Directory) -> Iterator[Contradiction]:
    """Yield what is wrong between values that are valid one by one."""
    etcd = directory.etcd
    if directory.kind == "static" and etcd.endpoints:
        yield (
            "directory.etcd.endpoints",
            'directory.etcd.endpoints are not used while directory.kind is "static". Set it to "etcd", or remove them.',
        )
    if directory.kind == "etcd" and directory.nodes:
        yield "directory.nodes", 'directory.nodes are not used while directory.kind is "etcd". Remove them.'
    if directory.kind == "etcd" and not etcd.endpoints:
        yield (
            "directory.etcd.endpoints",
            'directory.etcd.endpoints is empty while directory.kind is "etcd". Name at least one member.',
        )
    if bool(etcd.certificate) != bool(etcd.key) or (etcd.certificate and not etcd.ca):
        yield (
            "directory.etcd.certificate",
            "directory.etcd.certificate, its key and directory.etcd.ca are needed together. Name all three.",
        )
    if bool(etcd.user) != bool(etcd.password_file):
        yield (
            "directory.etcd.user",
            "directory.etcd.user and directory.etcd.password_file are needed together. Name both.",
        )
    if etcd.user and not etcd.ca and not all(endpoint.is_loopback for endpoint in etcd.endpoints):
        yield (
            "directory.etcd.user",
            "directory.etcd.user needs TLS, or its password could be read on its way. Set directory.etcd.ca.",
        )
