"""What a node is and has at this moment, as told to others, and what the metrics are told of an ended transfer."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from peermem.core.node import ADOPTED, ADOPTED_DMABUF, DeviceFacts, NodeDevice, NodeFacts, NodeState
from peermem.core.transfer import TransferFacts
from peermem.core.version import VERSION
from peermem.directory.base import NodeEntry
from peermem.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from peermem.broker.broker import Broker


def node_facts(broker: Broker) -> NodeFacts:
    """Return the node of a broker."""
    entry = broker.directory.nodes().get(broker.node)
    links = sum(broker.links.counts().values()) + sum(broker.serving.link_counts().values())
    return NodeFacts(
        node=broker.node,
        address=entry.address if entry else "",
        epoch=broker.epoch,
        version=VERSION,
        fabrics=tuple(kind for kind, fabric in broker.fabrics.items() if fabric.unavailable is None),
        started_at=broker.started_at,
        region_count=len(broker.regions),
        region_bytes=sum(region.memory.length for region in broker.regions),
        running_transfer_count=broker.transfers.running_count,
        link_count=links,
        grant_count=broker.serving.grant_count,
        nics=tuple(nic for nic, error in broker.proofs.nics.items() if error is None),
        devices=tuple(
            NodeDevice(name, device.kind, device.size)
            for name, device in sorted(broker.devices.items())
            if name not in (ADOPTED, ADOPTED_DMABUF)
        ),
    )


def known_nodes(broker: Broker) -> list[NodeFacts]:
    """Return the nodes that the directory knows or knew lately, and this one, in order of their names."""
    directory, now, links = broker.directory, time.time(), broker.links.by_node()
    away = directory.status().away_for
    state = NodeState.UP if away is None else NodeState.UNCONFIRMED
    since = 0.0 if away is None else now - away
    known = {node: _told(entry, state, since, links[node]) for node, entry in directory.nodes().items()}
    for node, gone in directory.gone().items():
        known[node] = _told(gone.entry, NodeState.GONE, now - gone.gone_for, links[node])
    known[broker.node] = node_facts(broker)
    return [known[node] for node in sorted(known)]


def _told(entry: NodeEntry, state: NodeState, since: float, links: int) -> NodeFacts:
    return NodeFacts(
        node=entry.node,
        address=entry.address,
        epoch=entry.epoch,
        version=entry.version,
        fabrics=entry.fabrics,
        nics=entry.nics,
        devices=entry.devices,
        state=state,
        since=since,
        links_here=links,
    )


def device_facts(broker: Broker) -> list[DeviceFacts]:
    """Return the devices of a broker's node in order of their names."""
    counts = Counter(region.device.name for region in broker.regions)
    return [
        DeviceFacts(name, device.kind, device.size, device.available, device.path, counts[name])
        for name, device in sorted(broker.devices.items())
    ]


def count_ended(metrics: Metrics, transfer: TransferFacts) -> None:
    """Count a transfer that ended."""
    metrics.transfer_ended(
        outcome=transfer.state,
        reason=transfer.error.reason if transfer.error else None,
        direction=transfer.direction,
        fabric=transfer.fabric if transfer.path else None,
        path=transfer.path,
        size=transfer.bytes_total,
        seconds=transfer.duration or 0.0,
        trace_id=transfer.trace_id,
    )
