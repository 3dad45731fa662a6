"""Preflight: finds out what works on this node by trying it, one verdict after the other.

Rules of this file:

* Each path of a device is tried, also the worse ones: which of them regions use is not preflight's choice.
* Devices and NICs are tried on memory that is allocated for it and given back, never on that of a region.
* One trial at a time on a node, so that the figures are of one; a caller that reads slowly holds up nobody.
* Host memory is tried once per NIC, whatever devices it stands for.
* Of dma-bufs that jobs hand in there is none to try: what came of the last one is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from peermem.broker.proofs import Outcome, Proofs
from peermem.broker.slots import SLOT, SLOTS
from peermem.core.errors import DeviceNotFound, FabricUnavailable, NicLost, PeermemError
from peermem.core.node import ADOPTED, ADOPTED_DMABUF, DeviceFacts
from peermem.core.preflight import (
    HostFacts,
    Needs,
    Verdict,
    judge_device,
    judge_nic,
    judge_node,
    known_reach,
    misplacing,
)
from peermem.core.topology import Topology
from peermem.core.types import FabricKind, Path
from peermem.device.base import Device
from peermem.fabric.base import Fabric, Proof
from peermem.offload import in_thread


class Step(NamedTuple):
    """One verdict, and how far preflight is with it."""

    verdict: Verdict
    done: int
    total: int


class Preflight:
    """Tries the devices and NICs of one node."""

    def __init__(
        self,
        devices: Mapping[str, Device],
        proofs: Proofs,
        topology: Callable[[], Topology],
        host: Callable[[Sequence[str]], HostFacts],
        fabric: Fabric | None,
    ) -> None:
        """`topology` and `host` read what holds now, in a thread; `host` gets the files below /dev/infiniband to try.
        `fabric` is the one that uses NICs; None: the daemon is configured to use none."""
        self._devices = devices
        self._proofs = proofs
        self._topology = topology
        self._host = host
        self._fabric = fabric
        self._one_at_a_time = asyncio.Lock()

    @property
    def obstacle(self) -> PeermemError | None:
        """What keeps the daemon from using any NIC now."""
        if self._fabric is not None:
            return self._fabric.unavailable
        return FabricUnavailable(
            'The daemon is configured to use no NIC. Set fabric to "auto" or "verbs" in its configuration.',
            fabric=FabricKind.VERBS.value,
        )

    def nic_error(self, nic: str) -> PeermemError | None:
        """Return what keeps the daemon from using a NIC port now; None where it uses it."""
        used = self._proofs.nics
        if nic in used:
            return used[nic]
        return self.obstacle or FabricUnavailable(
            f"The daemon does not use NIC port {nic}: its configuration does not name it, or the NIC came later than "
            "the daemon, which then needs a restart.",
            nic=nic,
        )

    async def run(self, names: Collection[str] = ()) -> AsyncGenerator[Step, None]:
        """Yield a step for each check of the node, for each NIC port, and for each path of these devices (none: all)
        with each NIC port. Raises DeviceNotFound before the first.
        """
        devices = [self._device(name) for name in sorted(set(names) or self._devices)]
        topology = await in_thread(self._topology)
        files = [nic.uverbs for nic in topology.nics.values() if nic.uverbs]
        host = await in_thread(partial(self._host, list(dict.fromkeys(files))))
        nics = dict(self._proofs.nics)
        verdicts = judge_node(host, topology, self._needs())
        verdicts += [judge_nic(nic, topology, error) for nic, error in nics.items()]
        trials = [(device, path, nic) for device in devices for path, nic in self._ways(device, nics)]
        total = len(verdicts) + len(trials)
        for done, verdict in enumerate(verdicts, 1):
            yield Step(verdict, done, total)
        host_memory: dict[str, Outcome] = {}
        for done, (device, path, nic) in enumerate(trials, len(verdicts) + 1):
            outcome = await self._outcome(device, path, nic, host_memory)
            yield Step(_verdict(device, path, nic, topology, outcome), done, total)

    async def known(self, topology: Topology) -> list[Verdict]:
        """Return what is known of each device by each path with each NIC port that it was tried with; tries nothing."""
        tried = [
            (device, path, nic, outcome)
            for device in self._devices.values()
            for path in device.paths
            for nic, outcome in self._proofs.known(device, path).items()
        ]
        return await in_thread(lambda: [_verdict(*each[:3], topology, each[3]) for each in tried])

    def _ways(self, device: Device, nics: Iterable[str]) -> list[tuple[Path, str]]:
        """Return the paths and NIC ports that there is something to say of."""
        if device.name == ADOPTED_DMABUF:
            return [(path, nic) for path in device.paths for nic in self._proofs.known(device, path)]
        return [(path, nic) for path in device.paths for nic in nics]

    async def reach(self, facts: Sequence[DeviceFacts]) -> list[DeviceFacts]:
        """Return facts of devices with where they are and which NICs reach them, as far as that is known."""
        topology = await in_thread(self._topology)
        return [self._reached(each, self._devices[each.name], topology) for each in facts]

    def _reached(self, facts: DeviceFacts, device: Device, topology: Topology) -> DeviceFacts:
        tried = {
            path: {nic: _error(outcome) for nic, outcome in self._proofs.known(device, path).items()}
            for path in device.paths
        }
        path, choice = known_reach(device, tried, topology)
        return replace(facts, path=path, pci_address=device.pci_address, nics=choice.nics, why=choice.why)

    def _device(self, name: str) -> Device:
        if name not in self._devices:
            known = ", ".join(sorted(self._devices)) or "none"
            raise DeviceNotFound(
                f"This node has no device {name[:80]!r}; it has {known}.",
                device=name[:80],
            )
        return self._devices[name]

    def _needs(self) -> Needs:
        paths = frozenset(device.path for device in self._devices.values())
        host = sum(
            device.size for device in self._devices.values() if device.path is Path.HOST and device.name != ADOPTED
        )
        maps_bars = any(device.kind == "pci_resource" for device in self._devices.values())
        return Needs(self.obstacle, paths, host + SLOT * SLOTS, maps_bars)

    async def _outcome(self, device: Device, path: Path, nic: str, host_memory: dict[str, Outcome]) -> Outcome:
        """Return what came of a trial; `host_memory` keeps it for each NIC and host memory."""
        if device.name == ADOPTED_DMABUF:
            return self._proofs.known(device, path).get(nic) or _gone(nic)
        if path is not Path.HOST:
            return await self._try(device, path, nic)
        if nic not in host_memory:
            host_memory[nic] = await self._try(device, path, nic)
        return host_memory[nic]

    async def _try(self, device: Device, path: Path, nic: str) -> Outcome:
        async with self._one_at_a_time:
            if nic not in self._proofs.nics:
                return _gone(nic)
            return await self._proofs.prove(device, path, nic)


def _gone(nic: str) -> NicLost:
    return NicLost(f"NIC port {nic} went away during preflight. Run preflight again.", nic=nic)


def _verdict(device: Device, path: Path, nic: str, topology: Topology, outcome: Outcome) -> Verdict:
    verdict = judge_device(device, path, nic, topology, _error(outcome))
    if not isinstance(outcome, Proof):
        return verdict
    if outcome.alignment > 1:
        verdict = replace(verdict, advice=f"{verdict.advice} {misplacing(nic, outcome.alignment)}".strip())
    return replace(
        verdict,
        latency=outcome.latency,
        write_bandwidth=outcome.write_bandwidth,
        read_bandwidth=outcome.read_bandwidth,
    )


def _error(outcome: Outcome) -> PeermemError | None:
    return outcome if isinstance(outcome, PeermemError) else None
