"""The node's NIC ports as the verbs fabric uses them: opened devices, the state of each port, and what went wrong.

Rules of this file:

* A NIC that does not work is no error here but an entry with its reason; the others serve.
* Events are taken from each device's file and acknowledged at once; what they change is asked anew, never guessed.
* A device that reported a fatal error is not used again: a NIC that comes back needs a new fabric.
"""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from peermem.core.errors import NicForbidden, NicLost, NicNotFound, NoGid, PeermemError, PortDown, PyverbsMissing
from peermem.core.gid import Gid, choose_gid
from peermem.fabric import verbs
from peermem.fabric.verbs_domains import Domains
from peermem.fabric.verbs_types import AsyncEvent, DeviceCaps, PortState, VerbsError

_REFRESHING = {AsyncEvent.PORT_ACTIVE, AsyncEvent.PORT_ERR, AsyncEvent.LID_CHANGE, AsyncEvent.GID_CHANGE}


class Nic:
    """An opened device, with the protection domains of those who use it."""

    def __init__(self, name: str, on_lost: Callable[[Nic], None], gid_index: int | None) -> None:
        """`gid_index` is the address of its ports to use. Raises VerbsError."""
        self.name = name
        self.device = verbs.Device(name)
        try:
            self.caps: DeviceCaps = self.device.caps()
            self.ports = [Port(self, number, gid_index) for number in range(1, self.caps.ports + 1)]
        except VerbsError:
            self.device.close()
            raise
        self.domains = Domains(self.device)
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.device.event_fd, self._on_event)

    def _on_event(self) -> None:
        while (event := self.device.next_event()) is not None:
            if event == AsyncEvent.DEVICE_FATAL:
                self._lose()
                return
            if event in _REFRESHING:
                for port in self.ports:
                    port.refresh()

    def _lose(self) -> None:
        self._loop.remove_reader(self.device.event_fd)
        self.device.is_lost = True
        for port in self.ports:
            port.error = NicLost(
                f"The NIC {self.name} was removed or its driver reported a fatal error. See the kernel's log, "
                "and restart the daemon when the NIC is back.",
                nic=port.name,
            )
        self._on_lost(self)

    async def close(self) -> None:
        """Close the device, after all that was made on it. Raises VerbsError."""
        self._loop.remove_reader(self.device.event_fd)
        await self.domains.close()
        self.device.close()


class Port:
    """One port of an opened device."""

    def __init__(self, nic: Nic, number: int, gid_index: int | None) -> None:
        """`gid_index` is the address to use, None: the one that fits best. Raises VerbsError."""
        self._gid_index = gid_index
        self.nic = nic
        self.number = number
        self.name = f"{nic.name}/{number}"
        self.error: PeermemError | None = None
        """What keeps it from working now."""
        self.state: PortState = nic.device.port(number)
        self.gids: Sequence[Gid] = nic.device.gids(number)
        self._judge()

    @property
    def link_layer(self) -> str:
        """As sysfs spells it."""
        return "Ethernet" if self.state.ethernet else "InfiniBand"

    def refresh(self) -> None:
        """Look again at its state and addresses, unless the device is lost."""
        if isinstance(self.error, NicLost):
            return
        try:
            self.state = self.nic.device.port(self.number)
            self.gids = self.nic.device.gids(self.number)
        except VerbsError:
            return  # the device is going away: an event will say so
        self._judge()

    def gid_for(self, remote: bytes | None = None) -> Gid | None:
        """Return the address to use, to the port with GID `remote` where that is known."""
        index = self._gid_index
        if index is None:
            index = choose_gid(self.gids, self.link_layer, remote)
        return next((gid for gid in self.gids if gid.index == index), None)

    def _judge(self) -> None:
        if not self.state.active:
            self.error = PortDown(
                f"The port {self.name} is not active. Connect its cable, or bring its network interface up "
                "(ip link set … up); on InfiniBand a subnet manager must run.",
                nic=self.name,
            )
        elif self.gid_for() is None:
            self.error = NoGid(
                f"The port {self.name} has no GID that links could use. Give its network interface an IP address.",
                nic=self.name,
            )
        else:
            self.error = None


class NicTable:
    """All NIC ports that the fabric may use."""

    def __init__(self, wanted: Sequence[str], on_lost: Callable[[Nic], None], gid_index: int | None = None) -> None:
        """`wanted` names ports, or devices for all their ports; empty means all. `on_lost` is called when a device is
        gone. `gid_index` is the address to use of each port, None: the one that fits best."""
        self._gid_index = gid_index
        self._wanted = wanted
        self._on_lost = on_lost
        self._nics: list[Nic] = []
        self._ports: dict[str, Port] = {}
        self._failed: dict[str, PeermemError] = {}
        self._missing: PeermemError | None = None

    def open(self) -> None:
        """Open every device; what fails is told by `errors` and `unavailable`."""
        try:
            names = verbs.device_names()
        except PyverbsMissing as error:
            self._missing = error
            return
        for name in names:
            if not self._wanted or any(wanted.partition("/")[0] == name for wanted in self._wanted):
                self._open(name)
        for wanted in self._wanted:
            known = {*self._ports, *self._failed}
            if not {wanted, f"{wanted}/1"} & known and not any(port.startswith(f"{wanted}/") for port in known):
                self._failed[wanted if "/" in wanted else f"{wanted}/1"] = not_found(wanted)

    def _open(self, name: str) -> None:
        try:
            nic = Nic(name, self._on_lost, self._gid_index)
        except VerbsError as error:
            self._failed[f"{name}/1"] = _not_opened(name, error)
            return
        self._nics.append(nic)
        for port in nic.ports:
            if not self._wanted or {name, port.name} & set(self._wanted):
                self._ports[port.name] = port

    @property
    def errors(self) -> Mapping[str, PeermemError | None]:
        """All ports, with what keeps each from working."""
        return {**{name: port.error for name, port in self._ports.items()}, **self._failed}

    @property
    def unavailable(self) -> PeermemError | None:
        """Why no port works; None where one does."""
        if self._missing is not None:
            return self._missing
        errors = list(self.errors.values())
        if not errors:
            return NicNotFound(
                "There is no RDMA NIC in the daemon's network namespace. Load the NIC's driver (for a software NIC: "
                "modprobe rdma_rxe; rdma link add rxe0 type rxe netdev eth0), or use the host's network namespace."
            )
        return None if None in errors else errors[0]

    def get(self, name: str) -> Port:
        """Return a port that works. Raises what keeps it from working, and NicNotFound."""
        if self._missing is not None:
            raise self._missing.again()
        error = self._failed.get(name)
        if error is not None:
            raise error.again()
        port = self._ports.get(name)
        if port is None:
            raise not_found(name)
        if port.error is not None:
            raise port.error.again()
        return port

    def usable(self) -> list[Port]:
        """Return the ports that work."""
        return [port for port in self._ports.values() if port.error is None]

    def counts(self) -> Counter[str]:
        """Open verbs objects by kind."""
        counts = Counter(dict.fromkeys(("pd", "mr", "mw", "cq", "qp"), 0))
        for nic in self._nics:
            counts.update(nic.device.counts)
        return counts

    async def close(self) -> None:
        """Close all devices, after all that was made on them. Raises VerbsError."""
        nics, self._nics = self._nics, []
        self._ports.clear()
        self._failed.clear()
        for nic in nics:
            await nic.close()


def nearest(ports: Iterable[Port], remote: bytes, is_ethernet: bool, load: Counter[str]) -> tuple[Port, Gid] | None:
    """Return the port, and its address, that is likeliest to reach the port with GID `remote`; of several that are
    alike, the one with the least `load` by name."""
    best: tuple[tuple[int, int], Port, Gid] | None = None
    for port in ports:
        gid = port.gid_for(remote) if port.state.ethernet == is_ethernet else None
        if gid is None:
            continue
        rank = (_differing_bits(gid.value, remote), load[port.name])
        if best is None or rank < best[0]:
            best = (rank, port, gid)
    return None if best is None else best[1:]


def _differing_bits(one: bytes, other: bytes) -> int:
    """Return how many bits are left after the prefix that two GIDs have in common."""
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_length()


def not_found(name: str) -> NicNotFound:
    """Return the error for a port that is not there."""
    return NicNotFound(
        f"There is no NIC port {name} in the daemon's network namespace. `peermemctl nics` lists the ports.", nic=name
    )


def _not_opened(name: str, error: VerbsError) -> PeermemError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT):
        return NicForbidden(
            f"The device file of the NIC {name} under /dev/infiniband can't be opened: {error}. Let the daemon's user "
            "read and write uverbs*, and hand the files to its container.",
            nic=f"{name}/1",
        )
    return NicLost(f"The NIC {name} can't be opened: {error}. See the kernel's log.", nic=f"{name}/1")
