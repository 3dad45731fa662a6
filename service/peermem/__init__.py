"""peermem: device memory as regions that jobs anywhere in a cluster read and write.

    with peermem.connect() as node:
        region = node.create_region(device="bar0", length="64MiB")
        node.transfer(region[0:4096], "nodes/b/regions/inbox").wait()

Rules of this file:

* It names what a job uses, and imports it on first use: the daemon and the tool import this package
  too, and the core is to stay importable without gRPC.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peermem import aio, errors
    from peermem.client.facts import (
        Device,
        Direction,
        Lease,
        Nic,
        NodeDevice,
        NodeInfo,
        NodeState,
        Progress,
        PublishedRegion,
        RegionInfo,
        RegionState,
        TransferInfo,
        TransferState,
        Verdict,
    )
    from peermem.client.node import Node, connect
    from peermem.client.region import Region
    from peermem.client.segments import Slice, Strided
    from peermem.client.storage import StorageInfo, StorageWay
    from peermem.client.tls import Tls
    from peermem.client.transfer import Transfer
    from peermem.core.errors import PeermemError
    from peermem.core.types import FabricKind, LeaseKind, Path

_HOMES = {
    "connect": "peermem.client.node",
    "Node": "peermem.client.node",
    "Region": "peermem.client.region",
    "Transfer": "peermem.client.transfer",
    "Slice": "peermem.client.segments",
    "Strided": "peermem.client.segments",
    "StorageInfo": "peermem.client.storage",
    "StorageWay": "peermem.client.storage",
    "Tls": "peermem.client.tls",
    "PeermemError": "peermem.core.errors",
    "FabricKind": "peermem.core.types",
    "LeaseKind": "peermem.core.types",
    "Path": "peermem.core.types",
}
_MODULES = ("aio", "errors")

__all__ = [
    "Device",
    "Direction",
    "FabricKind",
    "Lease",
    "LeaseKind",
    "Nic",
    "Node",
    "NodeDevice",
    "NodeInfo",
    "NodeState",
    "Path",
    "PeermemError",
    "Progress",
    "PublishedRegion",
    "Region",
    "RegionInfo",
    "RegionState",
    "Slice",
    "StorageInfo",
    "StorageWay",
    "Strided",
    "Tls",
    "Transfer",
    "TransferInfo",
    "TransferState",
    "Verdict",
    "aio",
    "connect",
    "errors",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'peermem' has no attribute {name!r}")
    value: object
    if name in _MODULES:
        value = import_module(f"peermem.{name}")
    else:
        value = getattr(import_module(_HOMES.get(name, "peermem.client.facts")), name)
    globals()[name] = value
    return value
