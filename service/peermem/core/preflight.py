"""What preflight finds on a node, and what it makes of it.

Rules of this file:

* Facts come in, verdicts go out. Nothing is read and nothing is tried here.
* A verdict says what was found also where it works, and why with a fix where it does not.
* What might be better is advice, not a failure: only what keeps bytes from moving fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from peermem.core.errors import (
    FabricUnavailable,
    KernelLockedDown,
    MemlockTooSmall,
    NicForbidden,
    NicNotFound,
    PathUnsupported,
    PeermemError,
    ProbeFailed,
    PyverbsMissing,
    RegistrationRefused,
)
from peermem.core.gid import Gid, choose_gid
from peermem.core.node import NicPort
from peermem.core.topology import Choice, P2pMapping, Topology
from peermem.core.types import Path
from peermem.core.units import format_size

_KERNEL_HAS = (
    ((6, 2), "mapped"),
    ((6, 15), "registered with a software NIC"),
    ((6, 16), "registered with mlx5"),
)
"""Releases of Linux, and what p2pmem can be since."""
_BY_THE_NIC = (Path.P2PDMA, Path.DMABUF, Path.LEGACY_PEER_MEMORY)
"""Paths by which a NIC itself accesses a BAR."""
_GPUS = ("cuda", "rocm")
"""Kinds of devices that copy by themselves."""


class Check(Enum):
    """What is checked of a node, in this order; values are the contract's."""

    KERNEL = "kernel"
    LOCKDOWN = "lockdown"
    IOMMU = "iommu"
    MEMLOCK = "memlock"
    CAPABILITIES = "capabilities"
    RDMA_CORE = "rdma-core"
    RDMA_SYSTEM = "rdma-system"
    DEVICE_FILES = "device-files"
    NICS = "nics"


class Capability(Enum):
    """Privileges that matter here; values are their numbers (include/uapi/linux/capability.h)."""

    CAP_DAC_OVERRIDE = 1
    CAP_IPC_LOCK = 14
    CAP_SYS_ADMIN = 21


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the kernel says about the host and about what this process may do."""

    kernel: str
    """Release, such as 6.12.9-amd64."""
    memlock: int | None
    """Bytes that the process may lock; None: no limit."""
    capabilities: frozenset[Capability]
    """Those that count for devices: none in a user namespace of its own."""
    rdma_mode: str
    """How network namespaces share NICs: shared or exclusive; empty where no RDMA is loaded."""
    device_files: Mapping[str, str]
    """Files below /dev/infiniband that were tried, each with why it can't be opened; empty where it can."""
    lockdown: str
    """none, integrity or confidentiality; empty where the kernel does not say."""
    iommu: Mapping[str, int]
    """IOMMU groups by their type, such as identity or DMA-FQ."""
    pyverbs: bool
    """Whether the process has loaded it."""
    rdma_core: str
    """Release of the libibverbs that the process has loaded, such as 56.1; empty for none."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What the daemon, as it is configured, needs of the node."""

    obstacle: PeermemError | None
    """What keeps it from using any NIC: its configuration, pyverbs that is missing, or the NICs themselves."""
    paths: frozenset[Path]
    """How its devices are reached."""
    pinned: int
    """Bytes of host memory that regions may keep registered."""
    maps_bars: bool
    """Whether it maps BARs that have no struct pages."""


class Placed(Protocol):
    """What counts of a device here."""

    @property
    def name(self) -> str:
        """Unique on the node."""

    @property
    def kind(self) -> str:
        """What it is, such as memfd."""

    @property
    def path(self) -> Path:
        """How a NIC reaches its memory."""

    @property
    def pci_address(self) -> str:
        """Of the PCI function that has the memory; empty for host memory."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One finding: about the node, where `check` is set; about a NIC port, where only `nic` is; or about a device."""

    detail: str
    """What was found, in words."""
    error: PeermemError | None = None
    """Why it does not work; None when it does."""
    advice: str = ""
    """What would make it better, or what else to try."""
    check: Check | None = None
    nic: str = ""
    device: str = ""
    path: Path | None = None
    latency: float = 0.0
    """Seconds of a small WRITE, where a device works; the bandwidths are in bytes per second."""
    write_bandwidth: float = 0.0
    read_bandwidth: float = 0.0


def judge_node(host: HostFacts, topology: Topology, needs: Needs) -> list[Verdict]:
    """Return a verdict for each check of the node."""
    verdicts = {
        Check.KERNEL: _kernel(host),
        Check.LOCKDOWN: _lockdown(host, needs),
        Check.IOMMU: _iommu(host),
        Check.MEMLOCK: _memlock(host, needs),
        Check.CAPABILITIES: _capabilities(host, needs),
        Check.RDMA_CORE: _rdma_core(host, needs),
        Check.RDMA_SYSTEM: _rdma_system(host),
        Check.DEVICE_FILES: _device_files(host, topology),
        Check.NICS: _nics(host, topology, needs),
    }
    return [replace(verdicts[check], check=check) for check in Check]


def judge_nic(nic: str, topology: Topology, error: PeermemError | None) -> Verdict:
    """Return the verdict on a NIC port that the fabric found to work, or to fail with `error`."""
    port = topology.nics.get(nic)
    if port is None:
        return Verdict("The kernel shows no such port.", error, nic=nic)
    index = choose_gid(port.gids, port.link_layer)
    gid = next((gid for gid in port.gids if gid.index == index), None)
    facts = [
        port.state or "no state",
        port.link_layer,
        f"{port.rate / 1e9:g} Gb/s" if port.rate else "",
        f"PCI {port.pci_address}" if port.pci_address else "software",
        f"NUMA node {port.numa_node}" if port.numa_node >= 0 else "",
        f"firmware {port.firmware}" if port.pci_address and port.firmware else "",
        _gid_words(gid, port.link_layer),
    ]
    return Verdict(", ".join(filter(None, facts)) + ".", error, _nic_advice(port, gid.type if gid else ""), nic=nic)


def judge_device(device: Placed, path: Path, nic: str, topology: Topology, error: PeermemError | None) -> Verdict:
    """Return the verdict on a device as a NIC port reaches it by a path, after a trial that worked or failed with
    `error`."""
    verdict = Verdict("", error, device=device.name, nic=nic, path=path)
    port = topology.nics.get(nic)
    if port is None:
        return replace(verdict, detail="The kernel shows no such port.")
    if path is Path.HOST and error is not None:
        return replace(verdict, detail="Host memory.")
    near = replace(topology, nics={nic: port}).choose_nics(device.pci_address).why
    if path is Path.STAGED:
        advice = _STAGED_GPU if device.kind in _GPUS else _STAGED
        return replace(verdict, detail=near, advice=advice if device.path is path else "")
    if path not in _BY_THE_NIC or not port.pci_address:
        return replace(verdict, detail=near)
    p2p = topology.p2p(device.pci_address, nic)
    found = None if error is None else diagnosis(device, nic, topology, error)
    return replace(verdict, detail=f"{near} {p2p.reason}", error=found, advice=p2p.fix)


def known_reach(
    device: Placed, tried: Mapping[Path, Mapping[str, PeermemError | None]], topology: Topology
) -> tuple[Path, Choice]:
    """Return the path and the NIC ports that regions on a device would use, as far as that is known without a trial.

    `tried` has, by path, the best first, the ports that were, each with what kept it from working.
    """
    errors: list[str] = []
    for path, ports in tried.items():
        proved = [nic for nic, error in ports.items() if error is None]
        if proved:
            return path, topology.choose_nics(device.pci_address, proved)
        errors += [error.message for error in ports.values() if error is not None]
    why = f"No NIC reaches it: {errors[0]}" if errors else "No NIC has been tried with it."
    return device.path, Choice((), why)


def misplacing(nic: str, alignment: int) -> str:
    """Return what it means for regions that a NIC port needs packets to begin at multiples of so many bytes."""
    return (
        f"NIC port {nic} places bytes right only where they begin at multiples of {alignment} and its path MTU is such "
        "a multiple: transfers that begin elsewhere are staged."
    )


def diagnosis(device: Placed, nic: str, topology: Topology, error: PeermemError) -> PeermemError:
    """Return what explains that a NIC port does not reach a device: PCI, where it lets nothing pass between them."""
    if not isinstance(error, (ProbeFailed, RegistrationRefused)) or not device.pci_address or nic not in topology.nics:
        return error
    p2p = topology.p2p(device.pci_address, nic)
    if p2p.mapping is not P2pMapping.NOT_SUPPORTED:
        return error
    return PathUnsupported(
        f"NIC port {nic} does not reach device {device.name}: {error.message} {p2p.reason} {p2p.fix}",
        device=device.name,
        nic=nic,
        probe=error.reason,
    )


def _kernel(host: HostFacts) -> Verdict:
    found = re.match(r"(\d+)\.(\d+)", host.kernel)
    release = tuple(map(int, found.groups())) if found else (99, 0)
    lacks = [f"{what} ({since[0]}.{since[1]})" for since, what in _KERNEL_HAS if release < since]
    return Verdict(
        f"Linux {host.kernel}.", advice=f"With a newer Linux p2pmem could be {_listed(lacks)}." if lacks else ""
    )


def _lockdown(host: HostFacts, needs: Needs) -> Verdict:
    if not host.lockdown:
        return Verdict("The kernel does not say whether it is locked down: securityfs is not mounted here.")
    if host.lockdown == "none":
        return Verdict("The kernel is not locked down.")
    detail = f"The kernel is locked down ({host.lockdown})."
    if not needs.maps_bars:
        return Verdict(detail)
    return Verdict(
        detail,
        KernelLockedDown(
            f"The kernel is locked down ({host.lockdown}), so that the BARs of this node's pci_resource devices can't "
            "be mapped. Boot without Secure Boot, or with a kernel that is not locked down (lockdown= and lsm=).",
            lockdown=host.lockdown,
        ),
    )


def _iommu(host: HostFacts) -> Verdict:
    if not host.iommu:
        return Verdict("No IOMMU is in use.")
    kinds = [f"{count} of type {kind}" for kind, count in sorted(host.iommu.items())]
    passes = set(host.iommu) == {"identity"}
    return Verdict(f"DMA {'passes through' if passes else 'is translated'}: IOMMU groups are {_listed(kinds)}.")


def _memlock(host: HostFacts, needs: Needs) -> Verdict:
    if host.memlock is None:
        return Verdict("The daemon may lock any amount of memory.")
    limit = format_size(host.memlock)
    if Capability.CAP_IPC_LOCK in host.capabilities:
        return Verdict(f"The limit of {limit} does not hold for the daemon, because it has CAP_IPC_LOCK.")
    detail = f"The daemon may lock {limit} of memory; registrations of up to {format_size(needs.pinned)} have to fit."
    fix = "Start it with LimitMEMLOCK=infinity (systemd), ulimit -l unlimited (shell), or with CAP_IPC_LOCK."
    if host.memlock >= needs.pinned:
        return Verdict(detail, advice=f"Memory that jobs hand in counts too. {fix}")
    error = MemlockTooSmall(f"{detail} {fix}", limit=host.memlock, needed=needs.pinned)
    return Verdict(detail, error)


def _capabilities(host: HostFacts, needs: Needs) -> Verdict:
    has = [capability.name for capability in Capability if capability in host.capabilities]
    detail = f"The daemon has {_listed(has)}." if has else "The daemon has none of those that devices ask for."
    if Capability.CAP_SYS_ADMIN in host.capabilities or not needs.paths & {Path.P2PDMA, Path.STAGED}:
        return Verdict(detail)
    return Verdict(
        detail,
        advice="With CAP_SYS_ADMIN preflight reads the ACS registers of PCIe switches, and devices can be switched on.",
    )


def _rdma_core(host: HostFacts, needs: Needs) -> Verdict:
    release = f"rdma-core {host.rdma_core}" if host.rdma_core else "rdma-core of unknown release"
    if isinstance(needs.obstacle, PyverbsMissing):
        return Verdict("pyverbs can't be used.", needs.obstacle)
    return Verdict(
        f"pyverbs with {release}." if host.pyverbs else "pyverbs is not loaded, because nothing asks for it."
    )


def _rdma_system(host: HostFacts) -> Verdict:
    if host.rdma_mode == "exclusive":
        return Verdict("Each NIC belongs to one network namespace.")
    if host.rdma_mode == "shared":
        return Verdict(
            "Every network namespace sees the NICs.",
            advice="What may open their device files can forge this daemon's packets. To keep containers apart from "
            "it, run 'rdma system set netns exclusive' at boot, before there are other network namespaces.",
        )
    return Verdict("No RDMA is loaded.")


def _device_files(host: HostFacts, topology: Topology) -> Verdict:
    without = [nic.name for nic in topology.nics.values() if not nic.uverbs]
    if without:
        return Verdict(
            f"{_listed(without)} without a device file.",
            NicForbidden(
                f"NIC port {_listed(without)} has no file below /dev/infiniband. Load its module: modprobe ib_uverbs.",
                nics=",".join(without),
            ),
        )
    refused = [f"/dev/infiniband/{name} ({cause})" for name, cause in host.device_files.items() if cause]
    if not refused:
        opened = [name for name, cause in host.device_files.items() if not cause]
        return Verdict(f"{_listed(opened)} can be opened." if opened else "There are none to open.")
    return Verdict(
        f"{len(refused)} of {len(host.device_files)} can't be opened.",
        NicForbidden(
            f"The daemon can't open {_listed(refused)}. Give its user read and write access to them, and in a "
            "container pass them in (--device, or the NIC's device plugin).",
            files=",".join(name for name, cause in host.device_files.items() if cause),
        ),
    )


def _nics(host: HostFacts, topology: Topology, needs: Needs) -> Verdict:
    names = list(topology.nics)
    detail = f"{_listed(names)}." if names else "None in the daemon's network namespace."
    if isinstance(needs.obstacle, FabricUnavailable):
        return Verdict(detail, needs.obstacle)
    if names:
        return Verdict(detail)
    if host.rdma_mode == "exclusive":
        cause = "NICs belong to one network namespace each (rdma system), and the daemon's own has none"
        fix = "Move one into it: rdma dev set NIC netns NAME."
    elif host.rdma_mode:
        cause, fix = "the kernel knows no RDMA device", "Load the NIC's driver, such as modprobe mlx5_ib."
    else:
        cause, fix = "no RDMA is loaded", "Load the NIC's driver: modprobe mlx5_ib, or rdma_rxe for a software NIC."
    return Verdict(detail, NicNotFound(f"The node has no NIC for the daemon: {cause}. {fix}"))


def _gid_words(gid: Gid | None, link_layer: str) -> str:
    if gid is None:
        return "no usable GID"
    return f"GID {gid} ({gid.type})" if gid.type and link_layer == "Ethernet" else f"GID {gid}"


def _nic_advice(port: NicPort, gid_type: str) -> str:
    if not port.pci_address:
        return "It is a software NIC, for tests: the CPU moves its bytes."
    if gid_type == "IB/RoCE v1" and port.link_layer == "Ethernet":
        return "Its only GIDs are of RoCE v1, which no router passes on; an IP address on its interface brings RoCE v2."
    return ""


_STAGED = (
    "The CPU copies, because no NIC reaches a BAR that the kernel maps without struct pages. A driver that gives the "
    "BAR to p2pmem would let NICs reach it."
)

_STAGED_GPU = (
    "The GPU copies through pinned host memory, because no NIC reaches its memory. A NIC that imports dma-bufs, and a "
    "driver of the GPU that exports them, would spare the copies."
)


def _listed(names: Iterable[str]) -> str:
    every: Sequence[str] = list(names)
    return " and ".join(filter(None, (", ".join(every[:-1]), every[-1])))
