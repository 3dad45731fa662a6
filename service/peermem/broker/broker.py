"""The broker: one object through which the daemon's doors reach regions and transfers.

Rules of this file:

* The policy is asked before anything of a region or transfer is told, touched or managed; what it hides is answered
  as if it did not exist.
* A tenant's limits are asked before something begins, never before something ends.
* Draining refuses new work, lets the running work end within its grace, then fails it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence

import structlog

from peermem.broker import ending, facts, published
from peermem.broker.access import Use
from peermem.broker.admission import local_regions
from peermem.broker.guard import Guard, streams
from peermem.broker.legs import LegRun
from peermem.broker.link_table import LinkTable
from peermem.broker.maker import RegionMaker
from peermem.broker.own_node import OwnNode
from peermem.broker.proofs import Proofs
from peermem.broker.reach import Registry
from peermem.broker.regions import Region, RegionTable
from peermem.broker.relays import Relay
from peermem.broker.runs import Transfer, TransferRun
from peermem.broker.serving import Serving
from peermem.broker.sessions import Session, SessionTable
from peermem.broker.settings import Settings
from peermem.broker.storage import StorageRun, StorageRuns
from peermem.broker.tenants import Share, Tenants
from peermem.broker.transfers import TransferTable
from peermem.broker.vouching import Vouching
from peermem.core.errors import (
    LeaseNotRenewable,
    RegionDeleted,
    RegionInUse,
    ShuttingDown,
    TransferCancelled,
    WrongNode,
)
from peermem.core.failpoints import reach
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.node import DeviceFacts, NodeFacts
from peermem.core.plan import Leg, plan_transfer
from peermem.core.policy import Action, Rules
from peermem.core.quota import Hold, Resource
from peermem.core.region import RegionRequest, State
from peermem.core.topology import Topology
from peermem.core.transfer import TransferFacts, TransferRequest
from peermem.core.types import FabricKind, LeaseKind
from peermem.device.base import Device, DeviceMemory
from peermem.directory.base import Directory
from peermem.fabric.base import Fabric
from peermem.remote.base import GrantSource, Remotes
from peermem.storage.base import Storage
from peermem.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

Plan = tuple[str, list[Leg]]
BIG = 4096
"""Segments from which planning is done in a thread: milliseconds of work."""


class Broker:
    """Admits work and owns the tables."""

    def __init__(
        self,
        settings: Settings,
        epoch: str,
        devices: Mapping[str, Device],
        fabrics: Mapping[FabricKind, Fabric],
        remotes: Remotes,
        directory: Directory,
        policy: Guard,
        sessions: SessionTable,
        metrics: Metrics,
        topology: Callable[[], Topology],
        storage: Storage,
    ) -> None:
        """`epoch` identifies this run of the daemon; devices by name; fabrics that have been started; `topology`
        reads what holds now, in a thread."""
        self.node = settings.node
        self.epoch = epoch
        self.started_at = time.time()
        self.devices = devices
        self.fabrics = fabrics
        self.sessions = sessions
        self.directory = directory
        self._remotes = remotes
        self.policy = policy
        self.tenants = Tenants(policy.rules, metrics.policy)
        self._metrics = metrics
        self._draining = False
        self._grant_ttl = settings.grant_ttl
        self._tasks: set[asyncio.Task[None]] = set()
        self.proofs = Proofs(fabrics.get(FabricKind.VERBS))
        self.registry = Registry(fabrics, self.proofs, topology, insist=FabricKind.TCP not in fabrics)
        self.regions = RegionTable(settings.node, settings.max_regions, self._let_go, metrics)
        self.transfers = TransferTable(
            settings.node,
            max_running=settings.max_running,
            max_weight=settings.max_segments * _HEAVY,
            keep_ended=settings.keep_ended,
            keep_ended_for=settings.keep_ended_for,
        )
        self.vouching = Vouching(settings.node, remotes)
        self._maker = RegionMaker(settings.node, self.regions, sessions, devices, self.registry, policy, self.tenants)
        self.serving = Serving(
            settings.node, epoch, fabrics, self.regions.find, policy, settings.grant_ttl, self._taken_back
        )
        self.storage = StorageRuns(storage, self._open_region, policy, self.tenants, metrics)
        self.links = LinkTable(fabrics, self._grant_source, settings, metrics.faults)
        sessions.on_close(lambda session: self._spawn(self.regions.end_session(session.token)))

    # regions

    async def create_region(self, subject: Subject, session: Session | None, request: RegionRequest) -> Region:
        """Make a region. Raises as RegionService.CreateRegion."""
        self._check_open()
        self.tenants.request(subject)
        region = await self._maker.make(subject, session, request)
        await reach("region.made")
        if self._draining:
            error = ShuttingDown(f"nodes/{self.node} is shutting down.")
            await self.regions.start_end(region, error)
            raise error
        if request.publish:
            await published.publish(self, region)
        if session is not None and session.closed:
            await self.regions.end_session(session.token)
        return region

    def region(self, name: ChildName) -> Region:
        """Return a region of this node, whoever may see it. Raises RegionNotFound, WrongNode."""
        self._check_here(name)
        return self.regions.find(name)

    def seen_region(self, subject: Subject, name: ChildName) -> Region:
        """Return a region that `subject` sees. Raises RegionNotFound, QuotaExceeded, WrongNode."""
        self.tenants.request(subject)
        return self.policy.seen_region(subject, self.region(name))

    def eyes(self, subject: Subject) -> Callable[[Region], bool]:
        """Return what tells which regions `subject` sees. Raises QuotaExceeded."""
        self.tenants.request(subject)
        return self.policy.sees_region(subject)

    async def delete_region(self, subject: Subject, name: ChildName, *, force: bool) -> None:
        """End a region. Raises RegionNotFound, RegionInUse, AccessDenied, WrongNode."""
        region = self.region(name)
        self.policy.check_region(subject, Action.MANAGE, region)
        if region.users and not force and region.end is None:
            raise RegionInUse(
                f"{name} is used by {len(region.users)} transfers or streams. Wait, cancel them, or force it.",
                region=name,
                users=len(region.users),
            )
        error = RegionDeleted(f"{name} was deleted by {subject} while the transfer used it.", region=name)
        await asyncio.shield(self.regions.start_end(region, error))

    def renew_leases(self, subject: Subject, names: Sequence[ChildName]) -> list[Region]:
        """Renew all or none. Raises RegionNotFound, LeaseNotRenewable, AccessDenied, WrongNode."""
        regions = [self.region(name) for name in names]
        for region in regions:
            self.policy.check_region(subject, Action.MANAGE, region)
            region.check_usable()
            if region.lease.kind is not LeaseKind.TTL:
                raise LeaseNotRenewable(
                    f"{region.name} has a lease of kind {region.lease.kind.value}, which needs no renewal.",
                    region=region.name,
                )
        for region in regions:
            self.regions.renew(region)
        return regions

    def use_region(self, subject: Subject, name: ChildName, action: Action, offset: int, length: int) -> Use:
        """Return a use of a range. Raises RegionNotFound, OutOfRange, AccessDenied, QuotaExceeded, WrongNode."""
        self.tenants.request(subject)
        region = self.region(name)
        self.policy.check_region(subject, action, region)
        use = Use(region)
        use.allowed = subject, action
        use.check_inside(offset, length)
        return use

    def map_region(self, name: ChildName, subject: Subject) -> DeviceMemory:
        """Return the memory for a local job to map. Raises RegionNotFound, AccessDenied, QuotaExceeded, WrongNode."""
        self.tenants.request(subject)
        region = self.region(name)
        self.policy.check_region(subject, Action.WRITE, region)  # what is mapped can be read, too
        self.policy.check_region(subject, Action.READ, region)
        region.check_usable()
        return region.memory

    async def go_by(self, rules: Rules) -> None:
        """Have another policy in force: what it does not allow ends at once, limits are counted anew."""
        self.policy.rules = rules
        self.tenants.go_by(rules)
        self.policy.fail_denied((each, each.subject, *use) for each in self.running() for use in each.uses)
        self.policy.fail_denied(streams(self.regions))
        self.links.look_again()
        await self.serving.revoke_denied()

    async def _let_go(self, region: Region) -> None:
        self.directory.withdraw(region.name)
        region.published = False
        await self.serving.revoke_region(region)
        await self.registry.unregister(region.memory, region.reach)

    # transfers

    async def create_transfer(self, subject: Subject, request: TransferRequest, *, relayed: bool) -> Transfer:
        """Start a transfer, here or on the node that has to run it; what is `relayed` to here is not relayed again.
        Raises as TransferService.CreateTransfer."""
        if request.weight <= BIG:
            return self.start_transfer(subject, request, relayed=relayed)
        self._check_room(subject, request)
        plan = await asyncio.to_thread(self._plan, request)
        self._check_open()
        self.transfers.check_room(request.weight)
        return self._start(subject, request, plan, relayed=relayed)

    def start_transfer(self, subject: Subject, request: TransferRequest, *, relayed: bool) -> Transfer:
        """Do as `create_transfer`, for one of at most BIG segments."""
        self._check_room(subject, request)
        return self._start(subject, request, self._plan(request), relayed=relayed)

    def _check_room(self, subject: Subject, request: TransferRequest) -> None:
        self._check_open()
        self.tenants.request(subject)
        self.transfers.check_room(request.weight)

    def _plan(self, request: TransferRequest) -> Plan:
        return plan_transfer(request.lists, self.node, self.fabrics.keys(), request.fabric)

    def _start(self, subject: Subject, request: TransferRequest, plan: Plan, *, relayed: bool) -> Transfer:
        node, parts = plan
        regions = local_regions(request, subject, self.node, self.regions, self.policy, self._remotes)
        name = ChildName(self.node, "transfers", f"t-{secrets.token_hex(6)}")
        if node != self.node and relayed:
            raise WrongNode(
                f"nodes/{self.node} was asked by another node to run a transfer of nodes/{node}. Correct the address "
                "of that node in the other one's directory.",
                node=node,
            )
        hold = self.tenants.hold(subject, {Resource.TRANSFERS: 1, Resource.OUTSTANDING: request.total})
        try:
            if node != self.node:
                relay = Relay(name, node, self._remotes.get(node), request, subject)
                return self._begin(name, relay, request.weight, relay.drive(self.vouching), hold)
            run = TransferRun(name, request, parts, regions, Share(self.tenants, subject), self._moved)
            return self._begin(name, run, request.weight, run.drive(self.links), hold)
        except BaseException:
            self.tenants.release(hold)
            raise

    def _begin(
        self, name: ChildName, transfer: Transfer, weight: int, drive: Coroutine[None, None, None], hold: Hold
    ) -> Transfer:
        self.transfers.add(name, transfer, weight)
        self._spawn(self._drive(name, drive, hold))
        return transfer

    async def _drive(self, name: ChildName, drive: Coroutine[None, None, None], hold: Hold) -> None:
        await drive
        asyncio.get_running_loop().call_soon(self._ended, name, hold)  # once who waits for the end has been told

    def _ended(self, name: ChildName, hold: Hold) -> None:
        self.tenants.release(hold)
        facts.count_ended(self._metrics, self.transfers.ended(name))

    def _moved(self, run: LegRun, size: int) -> None:
        self._metrics.transfer_bytes(run.leg.direction, run.fabric, run.path, run.use[1].device.name, size)

    def transfer(self, name: ChildName) -> TransferFacts:
        """Return a transfer of this node, whoever may see it. Raises TransferNotFound, WrongNode."""
        self._check_here(name)
        return self.transfers.facts(name)

    def seen_transfer(self, subject: Subject, name: ChildName) -> TransferFacts:
        """Return a transfer that `subject` sees. Raises TransferNotFound, WrongNode."""
        return self.policy.seen_transfer(subject, self.transfer(name))

    async def cancel_transfer(self, subject: Subject, name: ChildName) -> TransferFacts:
        """Cancel and wait for the fence. Raises TransferNotFound, AccessDenied, WrongNode."""
        facts = self.transfer(name)
        self.policy.check_transfer(subject, facts)
        running = self.transfers.find_running(name)
        if running is None:
            return facts
        running.fail(TransferCancelled(f"{name} was cancelled by {subject}.", transfer=name))
        await running.ended.wait()
        return running.facts

    # facts

    def node_facts(self) -> NodeFacts:
        """Return this node as told to others."""
        return facts.node_facts(self)

    async def find_node(self, node: str) -> NodeFacts:
        """Return a node: this one, or what another one answers. Raises NodeNotFound, NodeUnreachable."""
        return self.node_facts() if node == self.node else await self._remotes.get(node).node_facts()

    def device_facts(self) -> list[DeviceFacts]:
        """Return this node's devices in order of their names."""
        return facts.device_facts(self)

    # life

    def _grant_source(self, node: str) -> GrantSource:
        return OwnNode(self.serving, node) if node == self.node else self._remotes.get(node)

    def _check_open(self) -> None:
        if self._draining:
            raise ShuttingDown(f"nodes/{self.node} is shutting down. Try another node, or again after its restart.")

    def _open_region(self, name: ChildName) -> Region:
        self._check_open()
        return self.region(name)

    def _check_here(self, name: ChildName) -> None:
        if name.node != self.node:
            entry = self.directory.nodes().get(name.node)
            where = f"ask that node at {entry.address}" if entry else "the directory does not know that node"
            raise WrongNode(
                f"{name} belongs to nodes/{name.node}, this is nodes/{self.node}; {where}.",
                node=name.node,
                address=entry.address if entry else "",
            )

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task_defect", exc_info=error)

    async def tend(self) -> None:
        """Close idle links and let go of devices that vanished, for as long as the daemon runs."""
        while True:
            await asyncio.sleep(_TEND)
            try:
                self.links.tend(self.epoch_of)
                self.let_go_of_lost_devices()
            except Exception:
                log.exception("tend_defect")

    def epoch_of(self, node: str) -> str:
        """Return which run of a node's daemon the directory tells of; empty where it does not."""
        entry = self.directory.nodes().get(node)
        return entry.epoch if entry is not None else ""

    def let_go_of_lost_devices(self) -> None:
        """Revoke the regions whose device or memory is not there any more: the kernel waits for it."""
        for region in self.regions.vanished():
            self._taken_back(region)

    def _taken_back(self, region: Region) -> None:
        if region.state is State.READY:
            self._spawn(self.regions.revoke(region))

    def running(self) -> list[Transfer | StorageRun]:
        """Return what has not ended."""
        return [*self.transfers.running(), *self.storage.running()]

    async def drain(self, grace: float) -> None:
        """Refuse new work, wait up to `grace` seconds for what runs to end, then fail it."""
        self._draining = True
        await ending.drain(self, grace, self._grant_ttl)

    async def close(self) -> None:
        """End regions, links, grants and devices in that order; `drain` has ended the transfers."""
        self._draining = True
        await ending.close(self, self._grant_ttl)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=ending.MARGIN)
        await self._remotes.close()
        for device in self.devices.values():
            await device.close()


_TEND = 1.0
"""Seconds between two looks at what is idle or lost."""
_HEAVY = 8
"""Transfers with as many segments as one may have that may run at the same time: each keeps about 15 MB."""
