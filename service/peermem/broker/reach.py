"""What reaches a region's memory: which fabrics, through which NICs, and why those.

Rules of this file:

* A NIC is used for a device only after a probe moved the right bytes between the two (`proofs`).
* Among the NICs that were proved the nearest ones are used, and every region says which and why.
* Without such a NIC a region is reached over tcp, and says why; a daemon that insists on verbs refuses it instead.
* Memory that no NIC reaches has a staging buffer, which every fabric moves instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import structlog

from peermem.broker.proofs import Proofs
from peermem.broker.slots import StagingBuffer
from peermem.core.errors import PathUnsupported, PeermemError
from peermem.core.topology import Choice, Topology
from peermem.core.types import FabricKind
from peermem.device.base import Device, DeviceMemory
from peermem.fabric.base import Fabric, Proof
from peermem.offload import in_thread

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reach:
    """What reaches one region's memory."""

    fabrics: Collection[FabricKind]
    """What can move its bytes."""
    nics: Sequence[str]
    """NIC ports that it is registered with, nearest first."""
    why: str
    """Why these, or why none; a sentence."""
    staging: StagingBuffer | None = None
    """What the bytes pass through, where only the CPU reaches the memory."""


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

    async def register(self, device: Device, memory: DeviceMemory) -> Reach:
        """Make memory of `device` usable by every fabric that reaches it.

        Raises what keeps verbs from reaching it where the daemon insists on verbs.
        """
        why = "The daemon is configured not to use verbs."
        if FabricKind.VERBS in self._fabrics:
            try:
                choice = await self.nearest(device)
                reach = await self._register(device, memory, set(self._fabrics), choice.nics, choice.why)
            except PeermemError as error:
                if self._insist:
                    raise
                log.warning("verbs_does_not_reach", device=device.name, reason=error.reason, cause=error.message)
                why = f"No NIC reaches device {device.name}: {error.message}"
            else:
                return reach
        return await self._register(device, memory, set(self._fabrics) - {FabricKind.VERBS}, (), why)

    async def nearest(self, device: Device) -> Choice:
        """Return the proved NIC ports that are nearest to a device. Raises why there are none."""
        unavailable = self._fabrics[FabricKind.VERBS].unavailable
        if unavailable is not None:
            raise unavailable
        outcomes = await self._proofs.of(device)
        proved = [nic for nic, outcome in outcomes.items() if isinstance(outcome, Proof)]
        errors = [outcome for outcome in outcomes.values() if isinstance(outcome, PeermemError)]
        if not proved:
            raise errors[0]
        choice = (await in_thread(self._topology)).choose_nics(device.pci_address, proved)
        if not choice.nics:
            raise PathUnsupported(choice.why, device=device.name)
        return choice

    async def _register(
        self, device: Device, memory: DeviceMemory, kinds: Collection[FabricKind], nics: Sequence[str], why: str
    ) -> Reach:
        fabrics = [self._fabrics[kind] for kind in kinds]
        if memory.copier is not None:
            return Reach(kinds, nics, why, await StagingBuffer.open(fabrics, nics))
        done: list[Fabric] = []
        try:
            for fabric in fabrics:
                await fabric.register(memory, device.path, nics)
                done.append(fabric)
        except BaseException:
            for fabric in done:
                await fabric.unregister(memory)
            raise
        return Reach(kinds, nics, why)

    async def unregister(self, memory: DeviceMemory, reach: Reach) -> None:
        """Have the fabrics forget memory that nothing uses any more."""
        if reach.staging is not None:
            await reach.staging.close()
        for kind in reach.fabrics:
            await self._fabrics[kind].unregister(memory)
