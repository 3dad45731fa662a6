"""Which NICs are near which device memory, and whether a NIC may reach it over PCI.

Rules of this file:

* It decides on a snapshot that somebody else read; `device/sysfs.py` reads one.
* Whether PCI lets a NIC reach a device is decided as the kernel decides it (calc_map_type_and_dist in
  drivers/pci/p2pdma.c), because sysfs does not say. Only a probe proves it.
* What can't be known is UNKNOWN, never guessed: ACS bits without privilege, distances that a hypervisor hides.
* The nearest class of NICs serves a region, and every NIC of that class: they are its rails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto

from peermem.core.node import NicPort

_BRIDGE = 0x0604
"""Base class and subclass of PCI-to-PCI bridges, root ports and ports of switches among them."""
_MEM, _PREFETCH = 0x200, 0x2000  # include/linux/ioport.h
_ACS_REDIRECT = 0x04 | 0x08 | 0x20
"""P2P Request Redirect, P2P Completion Redirect, P2P Egress Control (PCI Express 6.0, 7.7.11.3)."""
_ROOT_COMPLEXES = {0x3C00: True, 0x3C01: True, 0x2F00: True, 0x2F01: True} | dict.fromkeys(
    (0x2020, 0x2030, 0x2031, 0x2032, 0x2033, 0x09A2), False
)
"""Intel's host bridges and root ports that the kernel trusts to forward, and whether only below one host bridge."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One window onto a PCI function's memory or registers."""

    index: int
    """As in the name of sysfs's `resourceN`."""
    start: int
    """Physical address; 0 where the kernel shows none without privilege, or has assigned none."""
    size: int
    """Bytes."""
    flags: int
    """IORESOURCE_* of include/linux/ioport.h."""

    @property
    def is_memory(self) -> bool:
        """Whether it is memory and not I/O ports."""
        return bool(self.flags & _MEM)

    @property
    def is_prefetchable(self) -> bool:
        """Whether reading has no side effects, so that writes may be combined."""
        return bool(self.flags & _PREFETCH)


@dataclass(frozen=True, slots=True)
class PciFunction:
    """One PCI function, bridges included."""

    address: str
    """Such as 0000:41:00.0."""
    host_bridge: str
    """Name of the hierarchy that it is in, such as pci0000:40."""
    bridges: tuple[str, ...]
    """Addresses of the bridges above it, nearest first; empty on a root bus."""
    numa_node: int
    """-1 where the firmware names none."""
    vendor: int
    device: int
    class_code: int
    """24 bits: base class, subclass, programming interface."""
    driver: str = ""
    """Kernel driver that is bound to it; empty when none is."""
    is_enabled: bool = False
    """Whether it answers to accesses to its memory (Memory Space in its Command register); a driver, or somebody
    who writes 1 to sysfs's `enable`, switches that on."""
    bars: tuple[Bar, ...] = ()
    acs: int | None = None
    """Its ACS Control register, 0 without the capability; None where reading it takes a privilege that the
    daemon lacks."""

    @property
    def redirects(self) -> bool | None:
        """Whether its ACS sends what passes between others up to the root complex; None where that can't be read."""
        return None if self.acs is None else bool(self.acs & _ACS_REDIRECT)

    @property
    def is_bridge(self) -> bool:
        """Whether it is a PCI-to-PCI bridge, such as a root port or a port of a switch."""
        return self.class_code >> 8 == _BRIDGE


@dataclass(frozen=True, slots=True)
class P2pmemPool:
    """The BAR memory that a driver gave to the kernel's allocator; sizes in bytes."""

    address: str
    """PCI address of its function."""
    size: int
    available: int
    is_published: bool
    """Whether other kernel drivers may use it too."""
    is_mappable: bool
    """Whether sysfs has the file `p2pmem/allocate` (Linux 6.2)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the whole machine decides."""

    cpu_vendor: str = ""
    """Such as GenuineIntel; empty on other architectures."""
    cpu_family: int = 0
    numa_nodes: int = 0
    """How many are online; 0 when not known."""
    is_virtual: bool = False
    """Whether a hypervisor says that it is there: then host bridges are its invention."""


class Distance(IntEnum):
    """How far a NIC is from a PCI function, nearest first; from PIX to SYS in the words of `nvidia-smi topo`."""

    SAME_FUNCTION = auto()
    SAME_DEVICE = auto()
    PIX = auto()
    """At most one switch between them."""
    PXB = auto()
    """Several bridges between them, all below one root port."""
    PHB = auto()
    """Through the host bridge that both are below."""
    NODE = auto()
    """Between host bridges of one NUMA node."""
    SYS = auto()
    """Between NUMA nodes."""
    UNKNOWN = auto()
    """The machine does not show it."""
    SOFTWARE = auto()
    """A software NIC: the CPU moves the bytes."""


_WORDS = {
    Distance.SAME_FUNCTION: "on the same PCI function as",
    Distance.SAME_DEVICE: "on the same PCI device as",
    Distance.PIX: "behind the same PCIe switch as",
    Distance.PXB: "more than one PCIe switch away from",
    Distance.PHB: "at the same host bridge as",
    Distance.NODE: "at another host bridge of the same NUMA node as",
    Distance.SYS: "across the sockets from",
    Distance.UNKNOWN: "at a distance that this machine does not show from",
}


class P2pMapping(Enum):
    """How the kernel would let a NIC address a device's BAR, named as in drivers/pci/p2pdma.c."""

    BUS_ADDR = "bus_addr"
    """Packets turn around in a switch."""
    THRU_HOST_BRIDGE = "thru_host_bridge"
    """Packets go up to the root complex, and it sends them down again."""
    NOT_SUPPORTED = "not_supported"
    CPU = "cpu"
    """No packets: a software NIC copies with the CPU."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class P2pVerdict:
    """Whether PCI lets a NIC reach a device's BAR."""

    mapping: P2pMapping
    reason: str
    """A sentence."""
    fix: str = ""
    """A sentence: what would allow it or make it faster; empty when nothing would."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The NIC ports for a region."""

    nics: tuple[str, ...]
    """Names, best first; none when no port can be used."""
    why: str
    """A sentence that also says what was passed over."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A snapshot of a node's PCI functions and NIC ports."""

    machine: Machine
    functions: Mapping[str, PciFunction]
    """By address, bridges included."""
    nics: Mapping[str, NicPort]
    """By name, in the order of their numbers. Only those of the daemon's network namespace are there."""

    def distance(self, pci_address: str, nic: str) -> Distance:
        """Return how far NIC port `nic` is from a PCI function."""
        client = self.nics[nic].pci_address
        if not client:
            return Distance.SOFTWARE
        here, there = self.functions.get(pci_address), self.functions.get(client)
        if here is None or there is None:
            return Distance.UNKNOWN
        if here is there:
            return Distance.SAME_FUNCTION
        if pci_address.rpartition(".")[0] == client.rpartition(".")[0]:
            return Distance.SAME_DEVICE
        if _common(here, there):
            return Distance.PIX if _hops(here, there) <= 4 else Distance.PXB
        return self._beyond_bridges(here, there)

    def hops(self, pci_address: str, nic: str) -> int | None:
        """Return the kernel's distance: bridges up from the PCI function and down to the NIC. None for a software
        NIC and for what is not on the node."""
        here, there = self.functions.get(pci_address), self.functions.get(self.nics[nic].pci_address)
        return None if here is None or there is None else _hops(here, there)

    def p2p(self, pci_address: str, nic: str) -> P2pVerdict:
        """Return whether PCI lets NIC port `nic` reach the BARs of a PCI function."""
        client = self.nics[nic].pci_address
        if not client:
            return P2pVerdict(
                P2pMapping.CPU, f"{nic} is a software NIC: the CPU moves its bytes, and PCI is not asked."
            )
        for address in (pci_address, client):
            if address not in self.functions:
                return P2pVerdict(P2pMapping.UNKNOWN, f"PCI function {address} is not on this node.")
        provider, requester = self.functions[pci_address], self.functions[client]
        obstacle = self._root_complex_obstacle(provider, requester)
        if not _common(provider, requester):
            return _by_root_complex(provider, requester, obstacle)
        return self._by_switch(provider, requester, obstacle)

    def choose_nics(self, pci_address: str, proven: Collection[str] | None = None) -> Choice:
        """Return the NIC ports for a region on a PCI function; for one in host memory `pci_address` is empty.

        `proven` are the ports whose probe passed; None when none was tried. Host memory takes every port with a
        PCI function, or every software NIC where there is no other.
        """
        passed: list[tuple[str, str]] = []
        by_distance: dict[Distance, list[NicPort]] = {}
        for nic in self.nics.values():
            if not nic.is_active:
                passed.append((nic.name, _state_words(nic)))
            elif proven is not None and nic.name not in proven:
                passed.append((nic.name, "not proven by a probe"))
            else:
                by_distance.setdefault(self._class_of(nic, pci_address), []).append(nic)
        if not by_distance:
            return Choice((), _sentence(["No NIC port can be used", *_grouped(passed)]))
        nearest = min(by_distance)
        chosen = [nic.name for nic in sorted(by_distance.pop(nearest), key=lambda nic: -nic.rate)]
        farther = [
            (nic.name, _where(distance, pci_address and "it"))
            for distance, nics in sorted(by_distance.items())
            for nic in nics
        ]
        reasons = _grouped((name, _where(nearest, pci_address)) for name in chosen)
        return Choice(tuple(chosen), _sentence([*reasons, *_grouped(farther + passed)]))

    def _class_of(self, nic: NicPort, pci_address: str) -> Distance:
        if pci_address:
            return self.distance(pci_address, nic.name)
        return Distance.UNKNOWN if nic.pci_address else Distance.SOFTWARE

    def _beyond_bridges(self, here: PciFunction, there: PciFunction) -> Distance:
        """Return the distance of functions that share no bridge."""
        nodes = {here.numa_node, there.numa_node}
        if here.host_bridge == there.host_bridge and not self.machine.is_virtual:
            return Distance.PHB
        if -1 not in nodes:
            return Distance.NODE if len(nodes) == 1 else Distance.SYS
        if self.machine.numa_nodes == 1 and not self.machine.is_virtual:
            return Distance.NODE
        return Distance.UNKNOWN

    def _by_switch(self, provider: PciFunction, requester: PciFunction, obstacle: str) -> P2pVerdict:
        """Return the verdict on functions below a common bridge."""
        path = [self.functions.get(address) for address in _path(provider, requester)]
        both = f"{requester.address} and {provider.address}"
        redirecting = [step.address for step in path if step and step.redirects]
        if redirecting:
            reason = f"ACS at {_listed(redirecting)} sends what passes between {both} up to the root complex"
            fix = (
                f"Boot with pci=disable_acs_redir={';'.join(redirecting)} to let it turn around below; the IOMMU "
                "then no longer separates the devices there."
            )
            if obstacle:
                return P2pVerdict(
                    P2pMapping.NOT_SUPPORTED, f"{reason}, which does not send it down again: {obstacle}.", fix
                )
            return P2pVerdict(P2pMapping.THRU_HOST_BRIDGE, f"{reason}, which sends it down again.", fix)
        if any(step is None or step.acs is None for step in path):
            outcome = f"it ends there: {obstacle}" if obstacle else "it comes back"
            return P2pVerdict(
                P2pMapping.UNKNOWN,
                f"Whether ACS sends what passes between {both} up to the root complex can't be read; if so, {outcome}.",
                "Give the daemon CAP_SYS_ADMIN to have the ACS registers read, or rely on the probe.",
            )
        return P2pVerdict(P2pMapping.BUS_ADDR, f"What passes between {both} turns around below the root complex.")

    def _root_complex_obstacle(self, provider: PciFunction, requester: PciFunction) -> str:
        """Return why the kernel does not trust the root complex to forward, as a clause; empty if it does."""
        if self.machine.cpu_vendor == "AuthenticAMD" and self.machine.cpu_family >= 0x17:
            return ""
        names = dict.fromkeys((provider.host_bridge, requester.host_bridge))
        for name in names:
            bridge = self._first_on(name)
            if bridge is None:
                return f"{name} shows no host bridge or root port by which the kernel could know it"
            kind = f"{bridge.vendor:04x}:{bridge.device:04x} of {name}"
            only_below_one = _ROOT_COMPLEXES.get(bridge.device) if bridge.vendor == 0x8086 else None
            if only_below_one is None:
                return f"host bridge {kind} is not in the kernel's list of those that do"
            if only_below_one and len(names) > 1:
                return f"host bridge {kind} does so only between its own devices"
        return ""

    def _first_on(self, host_bridge: str) -> PciFunction | None:
        """Return the function by which the kernel knows a root complex: the first of its root bus, if that is
        device 0 or a root port."""
        bus = host_bridge.removeprefix("pci") + ":"
        on_bus = [
            function
            for function in self.functions.values()
            if function.host_bridge == host_bridge and not function.bridges and function.address.startswith(bus)
        ]
        first = min(on_bus, key=lambda function: function.address, default=None)
        return first if first and (first.is_bridge or first.address.endswith(":00.0")) else None


def _common(one: PciFunction, other: PciFunction) -> str:
    """Return the nearest bridge or function that is on both ways up; empty when only the host bridge is."""
    above = (other.address, *other.bridges)
    return next((address for address in (one.address, *one.bridges) if address in above), "")


def _hops(one: PciFunction, other: PciFunction) -> int:
    up, down = (one.address, *one.bridges), (other.address, *other.bridges)
    common = _common(one, other)
    return up.index(common) + down.index(common) if common else len(up) + len(down)


def _path(provider: PciFunction, requester: PciFunction) -> list[str]:
    """Return the functions whose ACS counts: from the provider up to the common bridge, and those below it on the
    requester's side."""
    common = _common(provider, requester)
    up, down = (provider.address, *provider.bridges), (requester.address, *requester.bridges)
    return [*up[: up.index(common) + 1], *down[: down.index(common)]]


def _by_root_complex(provider: PciFunction, requester: PciFunction, obstacle: str) -> P2pVerdict:
    """Return the verdict on functions that share no bridge."""
    both = f"{requester.address} and {provider.address}"
    if not obstacle:
        return P2pVerdict(
            P2pMapping.THRU_HOST_BRIDGE, f"What passes between {both} goes through the root complex, which forwards it."
        )
    return P2pVerdict(
        P2pMapping.NOT_SUPPORTED,
        f"Between {both} is only the root complex, which the kernel does not trust to forward: {obstacle}.",
        "Use a NIC behind the same PCIe switch, or put both behind one.",
    )


def _state_words(nic: NicPort) -> str:
    return f"in state {nic.state}" if nic.state else "without a state"


def _where(distance: Distance, thing: str) -> str:
    """Return a distance from `thing` as a clause; without one it is host memory."""
    if distance is Distance.SOFTWARE:
        return "software only, so that the CPU moves the bytes"
    return f"{_WORDS[distance]} {thing}" if thing else "usable for host memory"


def _grouped(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return a clause for each reason, with the names that it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    return [f"{_listed(group)} {'is' if len(group) == 1 else 'are'} {reason}" for reason, group in names.items()]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _sentence(clauses: Sequence[str]) -> str:
    return "; ".join(clauses) + "."
