"""What the kernel says about PCI functions and NICs, read from sysfs below a root that is a parameter.

Rules of this file:

* Reading always succeeds: what is missing, garbage, refused or gone in the middle is empty, 0, -1 or None.
* One read of bounded size per attribute; of an address table's other columns only the rows in use are read.
* Nothing is remembered and nothing decided; `core/topology.py` decides.

Files and their contents: Documentation/ABI/stable/sysfs-class-infiniband and testing/sysfs-bus-pci of the Linux
kernel. In a network namespace class/infiniband has only the RDMA devices of the namespace.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from peermem.core.gid import Gid
from peermem.core.node import NicPort
from peermem.core.topology import Bar, Machine, P2pmemPool, PciFunction, Topology

SYSFS, PROCFS = Path("/sys"), Path("/proc")

_MOST = 8192
"""Bytes read of a file: attributes end at a page, and /proc/cpuinfo has all that counts in its first entry."""
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_RATE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) Gb/sec", re.ASCII)
_BARS = 6
"""Of the lines of `resource` the rest are the expansion ROM, SR-IOV's BARs and a bridge's windows."""
_COMMAND, _CAPABILITIES, _EXTENDED, _CONFIG_END = 0x04, 0x40, 0x100, 0x1000
_MEMORY_SPACE = 0x2
_ACS_CAPABILITY, _ACS_CONTROL = 0x000D, 6
_IN_WORDS = frozenset(("port_rcv_data", "port_xmit_data"))
_NOT_COUNTED = frozenset(("lifespan",))


def read_topology(root: Path = SYSFS, proc: Path = PROCFS) -> Topology:
    """Return what is on the node now. Takes some 10 ms on a large server: call it in a thread."""
    found = (pci_function(address, root) for address in sorted(_names(root / "bus/pci/devices")))
    return Topology(
        machine=_machine(root, proc),
        functions={function.address: function for function in found if function is not None},
        nics={port.name: port for port in nic_ports(root)},
    )


def pci_function(address: str, root: Path = SYSFS) -> PciFunction | None:
    """Return what the function at `address`, such as 0000:41:00.0, is now; None when there is none."""
    folder = root / "bus/pci/devices" / address
    host_bridge, above = _place(folder)
    if not _ADDRESS.fullmatch(address) or not host_bridge:
        return None
    command, acs = _config(folder / "config")
    return PciFunction(
        address=address,
        host_bridge=host_bridge,
        bridges=above,
        numa_node=_numa_node(folder),
        vendor=_integer(_text(folder / "vendor"), 16),
        device=_integer(_text(folder / "device"), 16),
        class_code=_integer(_text(folder / "class"), 16),
        driver=os.path.basename(_target(folder / "driver")),
        is_enabled=bool(command & _MEMORY_SPACE),
        bars=tuple(_bars(_text(folder / "resource"))),
        acs=acs,
    )


def p2pmem_pools(root: Path = SYSFS) -> list[P2pmemPool]:
    """Return the pools of p2pmem on the node, by address."""
    pools = (p2pmem_pool(address, root) for address in sorted(_names(root / "bus/pci/devices")))
    return [pool for pool in pools if pool is not None]


def p2pmem_pool(address: str, root: Path = SYSFS) -> P2pmemPool | None:
    """Return the p2pmem pool of the function at `address` as it is now; None when it has none."""
    folder = root / "bus/pci/devices" / address / "p2pmem"
    size = _integer(_text(folder / "size"))
    if not size:
        return None
    return P2pmemPool(
        address=address,
        size=size,
        available=_integer(_text(folder / "available")),
        is_published=_text(folder / "published") == "1",
        is_mappable=os.path.exists(folder / "allocate"),
    )


def nic_ports(root: Path = SYSFS, *, gids: bool = True) -> list[NicPort]:
    """Return the ports of all RDMA devices in the order of their numbers; none where there is no RDMA.

    GIDs are files by the hundred: without them it is quick.
    """
    verbs = root / "class/infiniband_verbs"
    uverbs = {_text(verbs / name / "ibdev"): name for name in _names(verbs)}
    return [
        _nic_port(root, device, port, uverbs.get(device, ""), with_gids=gids)
        for device in _numbered(root / "class/infiniband")
        for port in _numbered(root / "class/infiniband" / device / "ports")
        if port.isdecimal()
    ]


def port_counters(nic: str, root: Path = SYSFS) -> Mapping[str, int]:
    """Return the counters of a NIC port, such as mlx5_0/1, by the names that sysfs has in `counters` and
    `hw_counters`.

    Data is in bytes, although the kernel counts words of 4. Counters that the port does not keep are left out.
    """
    device, _, port = nic.rpartition("/")
    counters: dict[str, int] = {}
    for folder in (root / "class/infiniband" / device / "ports" / port / kind for kind in ("hw_counters", "counters")):
        for name in _names(folder):
            text = _text(folder / name)
            if text.isdecimal() and name not in _NOT_COUNTED:
                counters[name] = _integer(text) * (4 if name in _IN_WORDS else 1)
    return counters


def lockdown(root: Path = SYSFS) -> str:
    """Return the kernel's lockdown: none, integrity or confidentiality; empty when it does not say."""
    chosen = re.search(r"\[(none|integrity|confidentiality)\]", _text(root / "kernel/security/lockdown"))
    return chosen[1] if chosen else ""


def _machine(root: Path, proc: Path) -> Machine:
    first: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in _text(proc / "cpuinfo").splitlines()):
        first.setdefault(key.strip(), value.strip())
    nodes = [name for name in _names(root / "devices/system/node") if re.fullmatch(r"node\d+", name)]
    return Machine(
        cpu_vendor=first.get("vendor_id", ""),
        cpu_family=_integer(first.get("cpu family", "")),
        numa_nodes=len(nodes),
        is_virtual="hypervisor" in first.get("flags", "").split(),
    )


def _place(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return the host bridge that a function is below, and the bridges between, nearest first."""
    parts = _target(folder).split("/")
    for position in range(len(parts) - 1, -1, -1):
        if _HOST_BRIDGE.fullmatch(parts[position]):
            return parts[position], tuple(filter(_ADDRESS.fullmatch, reversed(parts[position + 1 : -1])))
    return "", ()


def _numa_node(folder: Path) -> int:
    text = _text(folder / "numa_node")
    return _integer(text) if text.isdecimal() else -1


def _bars(text: str) -> Iterator[Bar]:
    for index, line in enumerate(text.splitlines()[:_BARS]):
        values = [_integer(word, 16) for word in line.split()]
        if len(values) == 3 and values[1] > values[0]:
            yield Bar(index, start=values[0], size=values[1] - values[0] + 1, flags=values[2])


def _config(path: Path) -> tuple[int, int | None]:
    """Return the Command register and the ACS Control register (PCI Express 6.0, 7.5.1.1.3 and 7.7.11.3)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0, None
    try:
        command = int.from_bytes(os.pread(descriptor, 2, _COMMAND), "little")
        if command == 0xFFFF or not os.pread(descriptor, 4, _CAPABILITIES):
            return 0 if command == 0xFFFF else command, None  # off or gone; or no CAP_SYS_ADMIN: the file ends here
        return command, _acs_control(descriptor)
    except OSError:
        return 0, None
    finally:
        os.close(descriptor)


def _acs_control(descriptor: int) -> int | None:
    at = _EXTENDED
    for _ in range((_CONFIG_END - _EXTENDED) // 8):  # as many as there can be, however they point at each other
        header = int.from_bytes(os.pread(descriptor, 4, at), "little")
        if header == 0xFFFFFFFF:
            return None  # it went away
        if header & 0xFFFF == _ACS_CAPABILITY:
            return int.from_bytes(os.pread(descriptor, 2, at + _ACS_CONTROL), "little")
        at = header >> 20 & ~3
        if at < _EXTENDED:
            break
    return 0


def _nic_port(root: Path, device: str, port: str, uverbs: str, *, with_gids: bool) -> NicPort:
    folder = root / "class/infiniband" / device
    here = folder / "ports" / port
    parent = _text(folder / "parent")  # of a software NIC: the network interface that it sits on
    gids = tuple(_gids(here)) if with_gids else ()
    address = "" if parent else _function_of(folder)
    return NicPort(
        name=f"{device}/{port}",
        state=_after_colon(_text(here / "state")),
        link_layer=_text(here / "link_layer"),
        rate=_rate(_text(here / "rate")),
        numa_node=_numa_node(root / "bus/pci/devices" / address) if address else -1,
        pci_address=address,
        phys_state=_after_colon(_text(here / "phys_state")),
        netdev=parent or next((gid.netdev for gid in gids if gid.netdev), ""),
        gids=gids,
        node_guid=_text(folder / "node_guid"),
        firmware=_text(folder / "fw_ver"),
        uverbs=uverbs,
    )


def _function_of(device: Path) -> str:
    """Return the PCI function of an RDMA device, also when a part of the function has it; empty for none."""
    parts = os.path.realpath(device / "device").split("/") if os.path.exists(device / "device") else []
    return next((part for part in reversed(parts) if _ADDRESS.fullmatch(part)), "")


def _gids(folder: Path) -> Iterator[Gid]:
    rows, attributes = f"{folder}/gids", f"{folder}/gid_attrs"  # no Path for each: rxe has 1024 rows
    for index in sorted(filter(str.isdecimal, _names(rows)), key=int):
        value = _gid_value(_text(f"{rows}/{index}"))
        if any(value):
            yield Gid(int(index), value, _text(f"{attributes}/types/{index}"), _text(f"{attributes}/ndevs/{index}"))


def _gid_value(text: str) -> bytes:
    """Return `fe80:0000:…:0001` as 16 bytes; none at all for anything else."""
    digits = text.replace(":", "")
    with suppress(ValueError):
        if len(digits) == 32:
            return bytes.fromhex(digits)
    return b""


def _rate(text: str) -> int:
    """Return `100 Gb/sec (4X EDR)` in bits per second."""
    number = _RATE.match(text)
    return round(float(number[1]) * 1e9) if number else 0


def _after_colon(text: str) -> str:
    """Return the name in `4: ACTIVE`."""
    return text.rpartition(":")[2].strip()


def _integer(text: str, base: int = 10) -> int:
    """Return a number of at most 64 bits; 0 for anything else."""
    with suppress(ValueError):
        number = int(text, base)
        if 0 <= number < 1 << 64:
            return number
    return 0


def _text(path: Path | str) -> str:
    """Return an attribute without the white space around it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, _MOST).decode("ascii", "replace").strip()
    except OSError:  # an empty slot, or a device that went away
        return ""
    finally:
        os.close(descriptor)


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _names(folder: Path | str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _numbered(folder: Path) -> list[str]:
    """Return the names in a folder in the order of the numbers in them: mlx5_2 before mlx5_10."""
    return sorted(_names(folder), key=lambda name: [int(part) if part.isdecimal() else part for part in _parts(name)])


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name, flags=re.ASCII)
