"""What the page shows, as one value that JSON can hold.

Rules of this file:

* What there may be many of is listed up to a bound, with how many there are: what is in use or newest comes first.
* It is for the operator, whom no policy hides anything from: but no key, secret or token is among it.
* Sizes are bytes, times seconds, instants Unix time. Nothing is put into words that the page can put into words.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from peermem.api.http import Health
from peermem.api.page.machine import machine
from peermem.broker.broker import Broker
from peermem.broker.preflight import Preflight
from peermem.broker.regions import Region
from peermem.broker.storage import StorageRun
from peermem.core.errors import PeermemError
from peermem.core.topology import Topology
from peermem.core.transfer import TransferFacts
from peermem.core.types import FabricKind
from peermem.core.version import VERSION
from peermem.offload import in_thread
from peermem.telemetry.history import STEP, History

REGIONS, TRANSFERS, NODES, LINKS = 200, 50, 200, 200
ENDED = 8
"""Transfers that have ended, the last ones."""
_LABELS, _TEXT = 8, 120
"""Labels of a region, and characters of what a caller chose, that are shown."""

Json = dict[str, Any]


class Document:
    """Makes the document of one daemon."""

    def __init__(
        self,
        broker: Broker,
        preflight: Preflight,
        topology: Callable[[], Topology],
        history: History,
        health: Callable[[], Health],
    ) -> None:
        """`topology` reads what holds now, in a thread."""
        self._broker = broker
        self._preflight = preflight
        self._topology = topology
        self._history = history
        self._health = health

    async def __call__(self) -> Mapping[str, Any]:
        """Return it as of now; the loop has turns between its parts."""
        made: Json = {"at": time.time()}
        for name, part in self._parts().items():
            made[name] = part()
            await asyncio.sleep(0)
        topology = await in_thread(self._topology)
        devices = await self._preflight.reach(self._broker.device_facts())
        verdicts = await self._preflight.known(topology)
        errors = {nic: self._preflight.nic_error(nic) for nic in topology.nics}
        return made | await in_thread(lambda: machine(devices, topology, verdicts, errors))

    def _parts(self) -> Mapping[str, Callable[[], Any]]:
        return {
            "node": self._node,
            "regions": self._regions,
            "transfers": self._transfers,
            "files": lambda: [_file(run) for run in self._broker.storage.running()],
            "nodes": self._nodes,
            "links": self._links,
            "history": lambda: _history(self._history),
        }

    def _node(self) -> Json:
        facts, health = self._broker.node_facts(), self._health()
        return {
            "name": facts.node,
            "address": facts.address,
            "epoch": facts.epoch,
            "version": VERSION,
            "started_at": facts.started_at,
            "ready": health.ready,
            "reasons": list(health.reasons),
            "notes": list(health.notes),
            "fabrics": [
                {"kind": kind.value, "error": error_of(fabric.unavailable)}
                for kind, fabric in self._broker.fabrics.items()
            ],
            "regions": facts.region_count,
            "region_bytes": facts.region_bytes,
            "running": facts.running_transfer_count,
            "links": facts.link_count,
            "grants_given": facts.grant_count,
            "grants_held": self._broker.links.grant_count,
            "sessions": len(self._broker.sessions),
        }

    def _regions(self) -> Json:
        used = (region for run in self._broker.running() for _, region in run.uses)
        newest = reversed(list(self._broker.regions))
        listed = list(islice(dict.fromkeys([*islice(used, REGIONS), *newest]), REGIONS))
        return _bounded(map(_region, listed), len(self._broker.regions))

    def _transfers(self) -> Json:
        table = self._broker.transfers
        running = [_transfer(facts) for facts in islice(table.newest(running_only=True), TRANSFERS)]
        ended = (facts for facts in table.newest(running_only=False) if facts.state.ended)
        return _bounded(running, table.running_count) | {"ended": [_transfer(each) for each in islice(ended, ENDED)]}

    def _nodes(self) -> Json:
        nodes = self._broker.directory.nodes()
        linked = (each["node"] for each in self._every_link())
        in_use = (name for name in (self._broker.node, *linked) if name in nodes)
        chosen = sorted(islice(dict.fromkeys([*in_use, *sorted(nodes)]), NODES))
        return _bounded([{"name": name, "address": nodes[name].address} for name in chosen], len(nodes))

    def _links(self) -> Json:
        every, nodes = self._every_link(), self._broker.directory.nodes()
        chosen = sorted(every[:LINKS], key=lambda link: (link["node"], link["fabric"]))
        addresses = {name: entry.address for name, entry in nodes.items()}
        return _bounded([link | {"address": addresses.get(link["node"], "")} for link in chosen], len(every))

    def _every_link(self) -> list[Json]:
        """Return all links, those with grants first."""
        links = [
            _link(link.node, link.fabric.kind, "opened", link.grant_count, link.rails_down)
            for link in self._broker.links
        ]
        links += [
            _link(link.node, link.fabric.kind, "accepted", len(link.grants), 0) for link in self._broker.serving.links()
        ]
        return sorted(links, key=lambda link: (not link["grants"], link["node"], link["fabric"]))


def _link(node: str, fabric: FabricKind, side: str, grants: int, rails_down: int) -> Json:
    return {"node": node, "fabric": fabric.value, "side": side, "grants": grants, "rails_down": rails_down}


def error_of(error: PeermemError | None) -> Json | None:
    """Return an error as its reason and its sentence."""
    return None if error is None else {"reason": error.reason, "message": error.message[: 4 * _TEXT]}


def _bounded(listed: Iterable[Json], total: int) -> Json:
    return {"total": total, "listed": list(listed)}


def _region(region: Region) -> Json:
    facts = region.facts
    return {
        "name": facts.name.id,
        "length": facts.length,
        "device": facts.device,
        "path": facts.path.value,
        "owner": facts.owner[:_TEXT],
        "labels": {key[:_TEXT]: facts.labels[key][:_TEXT] for key in sorted(facts.labels)[:_LABELS]},
        "more_labels": max(0, len(facts.labels) - _LABELS),
        "lease": facts.lease.kind.value,
        "ttl": facts.lease.ttl,
        "expires_at": facts.expires_at,
        "state": facts.state.value,
        "created_at": facts.created_at,
        "users": len(region.users),
        "nics": list(facts.nics),
        "why": facts.why[: 4 * _TEXT],
    }


def _transfer(facts: TransferFacts) -> Json:
    source, destination = map(str, facts.ends or ("", ""))
    return {
        "name": facts.name.id,
        "state": facts.state.value,
        "source": source,
        "destination": destination,
        "segments": facts.segment_count,
        "total": facts.bytes_total,
        "done": facts.bytes_done,
        "fabric": facts.fabric.value if facts.fabric else None,
        "why": facts.fabric_why[: 4 * _TEXT],
        "direction": facts.direction.value,
        "path": facts.path.value if facts.path else None,
        "owner": facts.owner[:_TEXT],
        "executed_by": facts.executed_by,
        "error": error_of(facts.error),
        "created_at": facts.created_at,
        "duration": facts.duration,
    }


def _file(run: StorageRun) -> Json:
    facts, request = run.facts, run.request
    return {
        "order": request.order.value,
        "region": request.region.id,
        "file": request.path[-_TEXT:],
        "total": facts.bytes_total,
        "done": facts.bytes_done,
        "way": facts.way.value if facts.way else None,
        "owner": str(run.subject)[:_TEXT],
    }


def _history(history: History) -> Json:
    points = history.points
    return {
        "step": STEP,
        "at": [round(point.at, 2) for point in points],
        "p50": [point.p50 for point in points],
        "p99": [point.p99 for point in points],
        "bandwidth": _columns([point.bandwidth for point in points]),
        "ended": _columns([point.ended for point in points]),
    }


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    names = sorted({name for row in rows for name in row})
    return {name: [round(row.get(name, 0.0), 3) for row in rows] for name in names}
