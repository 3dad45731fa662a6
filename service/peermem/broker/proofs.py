"""Which NIC reaches which device by which path, as proved by moving bytes.

Rules of this file:

* What worked is believed as long as the NIC works; what failed is tried again when somebody asks after a while.
* One trial per device at a time. All host memory is one device: it is proved once per NIC.
* Path STAGED is proved in two steps: by the memory's copier, and by the NIC's access to host memory.
* Memory that jobs hand in is each time another exporter's: it is tried itself, and its bytes are kept.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import closing

from peermem import memory
from peermem.broker.kernel_copier import KernelCopier
from peermem.core.errors import DeviceFull, NicLost, PeermemError, ProbeMismatch
from peermem.core.node import ADOPTED_DMABUF
from peermem.core.types import Path
from peermem.device.base import Copier, Device, DeviceMemory
from peermem.fabric.base import Fabric, Proof
from peermem.memory import HostMemory

_TRIAL = 1 << 20
"""Bytes of a trial, where the device has as many left."""
_PAGE = 4096
_ROUNDS = 9
"""Copies that a copier's latency is the median of."""
_AGAIN = 30.0
"""Seconds after which what failed is tried again."""

Outcome = Proof | PeermemError


class Proofs:
    """The outcome of a trial for each device, path and NIC port."""

    def __init__(self, fabric: Fabric | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`fabric` is the one whose NICs are tried; None: there is none."""
        self._fabric = fabric
        self._clock = clock
        self._known: dict[tuple[str, Path, str], tuple[Outcome, float]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    @property
    def nics(self) -> Mapping[str, PeermemError | None]:
        """NIC ports by name, each with what keeps it from working now."""
        return self._fabric.nics if self._fabric is not None else {}

    async def of(self, device: Device, path: Path, memory: DeviceMemory | None = None) -> dict[str, Outcome]:
        """Return what is known of each NIC port and `device` by a path, after a trial of what is not known. `memory`
        is a region's, and tried itself where the device makes none."""
        if memory is not None and device.name == ADOPTED_DMABUF:
            return {nic: await self.prove(device, path, nic, memory) for nic in list(self.nics)}
        return {nic: await self._outcome(device, path, nic) for nic in list(self.nics)}

    def known(self, device: Device, path: Path) -> dict[str, Outcome]:
        """Return what is known of NIC ports and `device` by a path now; what was not tried is left out."""
        found: dict[str, Outcome] = {}
        for nic, error in self.nics.items():
            tried = self._known.get((_subject(device), path, nic))
            if error is not None:
                found[nic] = error
            elif tried is not None:
                found[nic] = tried[0]
        return found

    async def _outcome(self, device: Device, path: Path, nic: str) -> Outcome:
        error = self._obstacle(nic)
        if error is not None:
            return error
        async with self._lock(device):
            known = self._known.get((_subject(device), path, nic))
            if known is not None and (isinstance(known[0], Proof) or self._clock() < known[1] + _AGAIN):
                return known[0]
            return await self._try(device, path, nic)

    async def prove(self, device: Device, path: Path, nic: str, memory: DeviceMemory | None = None) -> Outcome:
        """Try again, whatever is known, and return the outcome; with `memory` instead of a new one, whose bytes are
        kept."""
        error = self._obstacle(nic)
        if error is not None:
            return error
        async with self._lock(device):
            return await self._try(device, path, nic, memory)

    def _obstacle(self, nic: str) -> PeermemError | None:
        """Return what keeps a NIC port from working now; it may have been removed since it was listed."""
        return self.nics.get(nic, NicLost(f"NIC port {nic} is not on this node any more.", nic=nic))

    def _lock(self, device: Device) -> asyncio.Lock:
        return self._locks.setdefault(_subject(device), asyncio.Lock())

    async def _try(self, device: Device, path: Path, nic: str, memory: DeviceMemory | None = None) -> Outcome:
        key = _subject(device), path, nic
        try:
            outcome: Outcome = await (
                self._trial(device, path, nic)
                if memory is None
                else self._trial_of(device, memory, path, nic, keep=True)
            )
        except DeviceFull as error:
            known = self._known.get(key)
            if known is not None and isinstance(known[0], Proof):
                return known[0]  # no room for another trial, and none is needed
            outcome = error.bare()
        except PeermemError as error:
            outcome = error.bare()
        self._known[key] = (outcome, self._clock())
        return outcome

    async def _trial(self, device: Device, path: Path, nic: str) -> Proof:
        assert self._fabric is not None  # there is a NIC, so there is a fabric
        if path is Path.HOST:
            host = HostMemory(_TRIAL, "peermem-probe")
            try:
                return await self._fabric.probe(nic, host, Path.HOST)
            finally:
                host.close()
        made = await device.allocate(min(_TRIAL, max(device.available, _PAGE)))
        try:
            return await self._trial_of(device, made, path, nic, keep=False)
        finally:
            made.close()

    async def _trial_of(self, device: Device, made: DeviceMemory, path: Path, nic: str, *, keep: bool) -> Proof:
        """Try a device's memory, whose bytes are put back afterwards with `keep`."""
        assert self._fabric is not None
        if path is not Path.STAGED:
            return await self._fabric.probe(nic, made, path, keep=keep)
        length = min(_TRIAL, made.length)
        copier = made.copier or KernelCopier(made)
        with closing(HostMemory(length, "peermem-probe")) as host, closing(HostMemory(length)) as before:
            wire = await self._fabric.probe(nic, host, Path.HOST)
            if not keep:
                return await self._staged(device, copier, host, wire)
            await copier.load(before, [(0, 0, length)])
            try:
                return await self._staged(device, copier, host, wire)
            finally:
                await copier.store(before, [(0, 0, length)])

    async def _staged(self, device: Device, copier: Copier, host: HostMemory, wire: Proof) -> Proof:
        """Return what copies through `host` and the wire come to together."""
        pattern = secrets.token_bytes(host.length)
        memory.write(host, 0, pattern)
        wrote = await self._timed(copier.store(host, [(0, 0, host.length)]))
        memory.write(host, 0, bytes(host.length))
        read = await self._timed(copier.load(host, [(0, 0, host.length)]))
        if memory.read(host, 0, host.length) != pattern:
            raise ProbeMismatch(
                f"Device {device.name} did not give back the bytes that the CPU wrote into it. Is its BAR memory, "
                "and not registers? Configure the range of it that is.",
                device=device.name,
            )
        small = min(_PAGE, host.length)
        latencies = [await self._timed(copier.store(host, [(0, 0, small)])) for _ in range(_ROUNDS)]
        return Proof(
            wire.latency + sorted(latencies)[_ROUNDS // 2],
            1 / (wrote / host.length + 1 / wire.write_bandwidth),
            1 / (read / host.length + 1 / wire.read_bandwidth),
        )

    async def _timed(self, work: Coroutine[None, None, None]) -> float:
        began = self._clock()
        await work
        return max(self._clock() - began, 1e-9)


def _subject(device: Device) -> str:
    return "" if device.path is Path.HOST else device.name
