"""GIDs: the addresses of NIC ports, and which of them a link uses.

Rules of this file:

* What sysfs does not say about subnets is told by the longest common prefix.
* A GID is shown as people write the address that it is, never as sysfs spells it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address

_IPV4_MAPPED = bytes(10) + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Gid:
    """One address of a NIC port (InfiniBand Architecture 1.4, 4.1.1; for RoCE an IP address)."""

    index: int
    """Its place in the port's table."""
    value: bytes
    """16 bytes."""
    type: str
    """`RoCE v2` or `IB/RoCE v1`, as the kernel spells them; empty where it does not say."""
    netdev: str = ""
    """Network interface that it belongs to; empty for InfiniBand."""

    @property
    def is_ipv4(self) -> bool:
        """Whether it stands for an IPv4 address."""
        return self.value.startswith(_IPV4_MAPPED)

    @property
    def is_link_local(self) -> bool:
        """Whether it is of fe80::/10."""
        return self.value[0] == 0xFE and self.value[1] & 0xC0 == 0x80

    def __str__(self) -> str:
        address = IPv6Address(self.value)
        return f"::ffff:{address.ipv4_mapped}" if self.is_ipv4 else str(address)


def choose_gid(gids: Iterable[Gid], link_layer: str, remote: bytes | None = None) -> int | None:
    """Return the index of the GID for a link, to the port with GID `remote` where that is known; None for none.

    RoCE: v2 before v1, then what is most likely in the subnet of `remote`, then IPv4 before IPv6 before link-local;
    never an IPv4 address towards an IPv6 one. InfiniBand: the subnet of `remote`, then the first.
    """
    usable = [gid for gid in gids if any(gid.value[8:]) and (not gid.is_ipv4 or any(gid.value[12:]))]
    if link_layer == "InfiniBand":
        subnet = remote and remote[:8]
        best = min(usable, key=lambda gid: (gid.value[:8] != subnet, gid.index), default=None)
        return best.index if best else None
    if remote is not None:
        ipv4 = Gid(0, remote, "").is_ipv4
        usable = [gid for gid in usable if gid.is_ipv4 == ipv4]

    def rank(gid: Gid) -> tuple[bool, int, bool, bool, int]:
        shared = _shared_bits(gid.value, remote) if remote else 0
        return gid.type != "RoCE v2", -shared, not gid.is_ipv4, gid.is_link_local, gid.index

    best = min(usable, key=rank, default=None)
    return best.index if best else None


def _shared_bits(one: bytes, other: bytes) -> int:
    """Return the length of the prefix that two GIDs have in common."""
    return 128 - (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_length()
