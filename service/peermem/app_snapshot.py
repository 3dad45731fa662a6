"""What the daemon's parts are at when somebody scrapes its metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from peermem.app_parts import Parts
from peermem.broker.broker import Broker
from peermem.broker.proofs import Outcome
from peermem.broker.sessions import SessionTable
from peermem.core.errors import PeermemError
from peermem.core.types import FabricKind
from peermem.device.base import Device
from peermem.device.host import read_own_memory
from peermem.directory.base import Directory
from peermem.fabric.base import Proof
from peermem.telemetry.condition import NO_VERBS, UNTRIED, WORKS, Condition, DeviceReach
from peermem.telemetry.directory import DirectoryUse
from peermem.telemetry.metrics import DeviceUse, LinkSide, Snapshot


def snapshot(broker: Broker, sessions: SessionTable, parts: Parts) -> Snapshot:
    """Return what is held, open and running now."""
    held = Counter[str]()
    for region in broker.regions:
        held[region.device.name] += region.memory.length
    leases = Counter(region.lease.kind for region in broker.regions)
    links = {(kind, LinkSide.OPENED): count for kind, count in broker.links.counts().items()}
    links |= {(kind, LinkSide.ACCEPTED): count for kind, count in broker.serving.link_counts().items()}
    return Snapshot(
        devices=tuple(
            DeviceUse(
                facts.name, facts.kind, facts.path, facts.size, facts.available, facts.region_count, held[facts.name]
            )
            for facts in broker.device_facts()
        ),
        leases=leases,
        running_transfers=broker.transfers.running_count,
        links=links,
        grants_given=broker.serving.grant_count,
        grants_held=broker.links.grant_count,
        attach_sessions=len(sessions),
        rails_down=broker.links.rails_down(),
        rejected_connections={FabricKind.TCP: parts.tcp.rejected_count} if parts.tcp is not None else {},
        verbs_objects=parts.verbs.object_counts() if parts.verbs is not None else {},
        nics={nic: error is None for nic, error in broker.proofs.nics.items()},
        paths={
            (device.name, nic, path): isinstance(outcome, Proof)
            for device in broker.devices.values()
            for path in device.paths
            for nic, outcome in broker.proofs.known(device, path).items()
        },
        directory=_directory(broker.directory),
    )


def _directory(directory: Directory) -> DirectoryUse:
    status = directory.status()
    counts = status.counts
    return DirectoryUse(
        kind=status.kind,
        away_for=status.away_for or 0.0,
        is_reached=status.away_for is None,
        is_refused=status.refusal is not None,
        lease_left=status.lease_left,
        nodes=len(directory.nodes()),
        published=status.published,
        unwritten=status.unwritten,
        renewals=counts.renewals,
        failed_renewals=counts.failed_renewals,
        lost_leases=counts.lost_leases,
        resumes=counts.resumes,
        listings=counts.listings,
        garbage=counts.garbage,
    )


def condition(broker: Broker, most_regions: int) -> Condition:
    """Return what the daemon has left, and how it reaches its devices, now."""
    reach = tuple(_reach(broker, device) for device in broker.devices.values())
    return Condition(read_own_memory(), most_regions, broker.tenants.highest(), reach)


def _reach(broker: Broker, device: Device) -> DeviceReach:
    best = device.paths[0]
    tried = {path: broker.proofs.known(device, path).values() for path in device.paths}
    proved = [path for path, outcomes in tried.items() if any(isinstance(each, Proof) for each in outcomes)]
    path = proved[0] if proved else device.path
    return DeviceReach(device.name, device.kind, path, best, WORKS if best in proved else _why(broker, tried[best]))


def _why(broker: Broker, outcomes: Collection[Outcome]) -> str:
    """Return what keeps a device from a path on which no NIC is proved."""
    verbs = broker.fabrics.get(FabricKind.VERBS)
    if verbs is None:
        return NO_VERBS
    if verbs.unavailable is not None:
        return verbs.unavailable.reason
    return next((outcome.reason for outcome in outcomes if isinstance(outcome, PeermemError)), UNTRIED)
