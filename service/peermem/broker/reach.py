"""What reaches a region's memory: which fabrics, by which path, through which NICs, and why those.

Rules of this file:

* A path and a NIC are used for a device only after a probe moved the right bytes that way (`proofs`).
* A device's paths are tried in its order, the first that some NIC was proved on is used, and among those NICs the
  nearest ones; every region says which and why.
* Without such a NIC a region is reached over tcp, and says why; a daemon that insists on verbs refuses it instead.
* Memory of path STAGED has a staging buffer, which every fabric moves instead; other memory gets one when a transfer
  needs it. Memory that only a copier touches in this process is staged over every fabric but verbs.
* What the CPU does not reach at all is never offered as STAGED: NICs move it, or the region is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from peermem.broker.proofs import Proofs
from peermem.broker.slots import Staging
from peermem.core.errors import FabricUnavailable, PathUnsupported, PeermemError
from peermem.core.preflight import diagnosis
from peermem.core.topology import Topology
from peermem.core.types import FabricKind, Path
from peermem.device.base import Device, DeviceMemory
from peermem.fabric.base import Fabric, Proof
from peermem.offload import in_thread

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Way:
    """How NICs are to reach a device's memory."""

    path: Path
    nics: Sequence[str]
    """NIC ports, nearest first."""
    why: str
    """Why these, or why none; a sentence."""
    alignment: int = 1
    """Bytes at whose multiples packets have to begin; see Proof."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What reaches one region's memory."""

    way: Way
    fabrics: Collection[FabricKind]
    """What can move its bytes."""
    staging: Staging
    """What the bytes pass through, where no NIC can place them."""
    is_copied: bool = False
    """Whether a copier alone touches the memory in this process."""

    def stages(self, kind: FabricKind) -> bool:
        """Whether all bytes that a fabric moves are copied to or from a staging buffer."""
        return self.way.path is Path.STAGED or (self.is_copied and kind is not FabricKind.VERBS)


class Registry:
    """Has the fabrics know the memory of regions."""

    def __init__(
        self,
        fabrics: Mapping[FabricKind, Fabric],
        proofs: Proofs,
        topology: Callable[[], Topology],
        *,
        insist: bool,
    ) -> None:
        """`topology` reads what holds now, in a thread. `insist`: memory that verbs does not reach is refused."""
        self._fabrics = fabrics
        self._proofs = proofs
        self._topology = topology
        self._insist = insist

    async def prepare(self, device: Device) -> None:
        """Have a device that allocates tried, as far as it has not been: now it may still have room for that."""
        verbs = self._fabrics.get(FabricKind.VERBS)
        if verbs is None or verbs.unavailable is not None:
            return
        for path in device.paths:
            outcomes = await self._proofs.of(device, path)
            if any(isinstance(outcome, Proof) for outcome in outcomes.values()):
                return

    async def register(self, device: Device, memory: DeviceMemory, owner: str) -> Reach:
        """Make memory of `device` usable by every fabric that reaches it; `owner` is whose it is, as nodes speak of a
        subject.

        Raises what keeps verbs from reaching it where the daemon insists on verbs.
        """
        why = "The daemon is configured not to use verbs."
        if FabricKind.VERBS in self._fabrics:
            try:
                return await self._by_nic(device, memory, owner)
            except PeermemError as error:
                if self._insist:
                    raise
                log.warning("verbs_does_not_reach", device=device.name, reason=error.reason, cause=error.message)
                why = f"No NIC reaches device {device.name}: {error.message}"
                if not memory.is_reached_by_cpu:
                    raise _unreachable(memory, error) from error
        if not memory.is_reached_by_cpu:
            raise _unreachable(memory, FabricUnavailable(why))
        way = Way(device.path if memory.copier is None else Path.STAGED, (), _named(memory, why))
        return await self._register(memory, way, set(self._fabrics) - {FabricKind.VERBS}, owner)

    async def _by_nic(self, device: Device, memory: DeviceMemory, owner: str) -> Reach:
        """Register by the first path that works. Raises why the first one does not, when none does."""
        unavailable = self._fabrics[FabricKind.VERBS].unavailable
        if unavailable is not None:
            raise unavailable.again()
        errors: list[PeermemError] = []
        kinds = set(self._fabrics) if memory.is_reached_by_cpu else {FabricKind.VERBS}
        for path in device.paths:
            if path is Path.STAGED and not memory.is_reached_by_cpu:
                continue
            try:
                way = await self._way(device, path, memory)
                if errors:
                    way = replace(way, why=f"{way.why} No better path works: {errors[0].message}")
                return await self._register(memory, replace(way, why=_named(memory, way.why)), kinds, owner)
            except PeermemError as error:
                errors.append(error)
        raise errors[0]

    async def _way(self, device: Device, path: Path, memory: DeviceMemory) -> Way:
        """Return the proved NIC ports that are nearest to a device. Raises why there are none."""
        outcomes = await self._proofs.of(device, path, memory)
        proofs = {nic: outcome for nic, outcome in outcomes.items() if isinstance(outcome, Proof)}
        topology = await in_thread(self._topology)
        if not proofs:
            nic, error = next((nic, error) for nic, error in outcomes.items() if isinstance(error, PeermemError))
            raise diagnosis(device, nic, topology, error).again()
        choice = topology.choose_nics(device.pci_address, list(proofs))
        if not choice.nics:
            raise PathUnsupported(choice.why, device=device.name)
        return Way(path, choice.nics, choice.why, max(proofs[nic].alignment for nic in choice.nics))

    async def _register(self, memory: DeviceMemory, way: Way, kinds: Collection[FabricKind], owner: str) -> Reach:
        fabrics = [self._fabrics[kind] for kind in kinds]
        reach = Reach(way, kinds, Staging(fabrics, way.nics, owner), memory.copier is not None)
        if way.path is Path.STAGED:
            await reach.staging.open()
            return reach
        done: list[Fabric] = []
        try:
            for fabric in [each for each in fabrics if not reach.stages(each.kind)]:
                await fabric.register(memory, way.path, way.nics, owner)
                done.append(fabric)
        except BaseException:
            for fabric in done:
                await fabric.unregister(memory)
            raise
        return reach

    async def unregister(self, memory: DeviceMemory, reach: Reach) -> None:
        """Have the fabrics forget memory that nothing uses any more."""
        await reach.staging.close()
        for kind in reach.fabrics:
            await self._fabrics[kind].unregister(memory)


def _named(memory: DeviceMemory, why: str) -> str:
    """Return why, with who exported the memory."""
    return f"A dma-buf of exporter {memory.exporter}. {why}" if memory.exporter else why


def _unreachable(memory: DeviceMemory, error: PeermemError) -> PeermemError:
    """Return the reason for which memory that the CPU does not reach can't be a region."""
    return type(error)(
        f"{error.message} Nor can it be staged: exporter {memory.exporter} lets the CPU map nothing of it.",
        **error.metadata,
    )
