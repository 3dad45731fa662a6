"""The nodes that etcd tells of: read once, then followed by a watch.

Rules of this file:

* A watch that was broken off goes on from the revision after the last one that was seen: that of its last event, as a
  header names etcd's newest one also while older events are on their way. Only where that is not to be had any more
  (compacted, or another etcd answers) everything is read again.
* A node goes when etcd says so. One that is missing in a new reading, which may be of an etcd that lost its data, stays
  for the time of a lease, and so does one that went while the watch was broken off, whose lease may have ended because
  nobody reached etcd: if it lives, it is back by then.
* An entry that makes no sense is left out, counted, and told in the log once for each revision of it.
* What this node says of itself goes before what etcd says of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import structlog

from peermem.directory.base import Changes, Counts, GoneNode, NodeEntry
from peermem.directory.etcd_connection import Connection, Fault
from peermem.directory.records import BadRecord, Keys, NodeRecord, read_node
from peermem.etcd import rpc_pb2

log = structlog.get_logger(__name__)

MAX_NODES = 65_536
"""More are left out: whoever can write in etcd must not fill this node's memory."""
GONE_KEPT = 600.0
"""Seconds that a node that has gone is told of."""
_MAX_GONE = 1024
_AT_ONCE = 100
"""Entries read in one turn of the loop: some milliseconds."""


@dataclass(frozen=True, slots=True)
class _Gone:
    entry: NodeEntry
    at: float


class Nodes:
    """The table of nodes, kept up to date by `follow`."""

    def __init__(
        self, keys: Keys, grace: float, changes: Changes, counts: Counts, on_own: Callable[[int], None]
    ) -> None:
        """A node that is missing without a word stays for `grace` seconds. `on_own` is called when this node's own
        entry is deleted, or is somebody else's, with the revision at which it is."""
        self._keys = keys
        self._grace = grace
        self._changes = changes
        self._counts = counts
        self._on_own = on_own
        self._entries: dict[str, NodeEntry] = {}
        self._gone: dict[str, _Gone] = {}
        self._own: NodeEntry | None = None
        self._revision = 0
        """The last one that is known whole; 0: none is."""
        self._cluster = 0
        self._is_fresh = False
        """Whether it was read since the watch began last."""
        self._missed = 0
        """etcd's revision when the watch was resumed last: what happened until then was missed."""
        self._timers: set[asyncio.TimerHandle] = set()

    @property
    def is_known(self) -> bool:
        """Whether the nodes have been read."""
        return self._revision > 0

    def entries(self) -> Mapping[str, NodeEntry]:
        """Return the nodes."""
        return MappingProxyType(self._entries)

    def gone(self) -> Mapping[str, GoneNode]:
        """Return nodes that went lately."""
        now = asyncio.get_running_loop().time()
        return {
            node: GoneNode(gone.entry, now - gone.at) for node, gone in self._gone.items() if now - gone.at < GONE_KEPT
        }

    def set_own(self, entry: NodeEntry | None) -> None:
        """Say what this node says of itself; None: it left."""
        before, self._own = self._own, entry
        if entry is not None:
            self._add(entry)
        elif before is not None:
            self._entries.pop(before.node, None)
        self._changes.tell()

    async def follow(self, connection: Connection, on_known: Callable[[], None]) -> None:
        """Keep the table, which has been read, up to date; `on_known` is called when it is. Ends with a Fault only."""
        while True:
            async for answer in connection.watch(self._keys.nodes, self._revision + 1):
                if answer.compact_revision:
                    break
                if answer.canceled:  # one that may not watch is told so in what tells of the watch's making
                    raise Fault(f"it ended the watch: {answer.cancel_reason}")
                if answer.created:
                    header = answer.header
                    if not header.cluster_id:  # etcd's proxy, which tells nothing of the cluster here
                        header = await connection.header(self._keys.nodes)
                    if self._is_another(header):
                        break
                    self._counts.resumes += not self._is_fresh
                    self._missed = 0 if self._is_fresh else header.revision
                    self._is_fresh = False
                    on_known()
                self._take(answer)
            await self.read(connection)

    def _is_another(self, header: rpc_pb2.ResponseHeader) -> bool:
        return header.cluster_id != self._cluster or header.revision < self._revision

    async def read(self, connection: Connection) -> None:
        """Read everything. Raises Fault."""
        missing = {node: entry for node, entry in self._entries.items() if self._own is None or node != self._own.node}
        header, has_own = rpc_pb2.ResponseHeader(), False
        async for page in connection.pages(self._keys.nodes):
            header = header if header.revision else page.header
            for number, kv in enumerate(page.kvs):
                has_own |= self._own is not None and kv.key == self._keys.node(self._own.node)
                missing.pop(self._put(kv) or "", None)
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)
        self._cluster, self._revision, self._is_fresh = header.cluster_id, header.revision, True
        self._counts.listings += 1
        if missing:
            log.info("directory_nodes_missing", nodes=sorted(missing)[:16], count=len(missing), grace=self._grace)
            self._later(missing)
        if self._own is not None and not has_own:
            self._on_own(header.revision)
        self._changes.tell()

    def _later(self, missing: Mapping[str, NodeEntry]) -> None:
        """Take nodes for gone that are not back within the grace time."""

        def over() -> None:
            self._timers.discard(timer)
            for node, entry in missing.items():
                if self._entries.get(node) is entry:
                    self._remove(node)
            self._changes.tell()

        timer = asyncio.get_running_loop().call_later(self._grace, over)
        self._timers.add(timer)

    def _take(self, answer: rpc_pb2.WatchResponse) -> None:
        for event in answer.events:
            if event.type == rpc_pb2.Event.PUT:
                self._put(event.kv)
            else:
                self._delete(event.kv)
        if answer.events:
            self._changes.tell()
        if answer.created or answer.fragment:  # its header names what is still to come
            return
        seen = answer.events[-1].kv.mod_revision if answer.events else answer.header.revision
        self._revision = max(self._revision, seen)

    def _put(self, kv: rpc_pb2.KeyValue) -> str | None:
        """Enter a node; return which, or None where it makes no sense."""
        try:
            node = self._keys.node_of(kv.key)
            if node not in self._entries and len(self._entries) >= MAX_NODES:
                raise BadRecord(f"there are {MAX_NODES} nodes, the limit")
            record = read_node(node, kv.value)
        except BadRecord as bad:
            self._counts.garbage += 1
            log.warning("directory_entry_ignored", key=_shown(kv.key), cause=str(bad)[:200])
            return None
        self._enter(record, kv.mod_revision)
        return record.entry.node

    def _enter(self, record: NodeRecord, revision: int) -> None:
        if self._own is None or record.entry.node != self._own.node:
            self._add(record.entry)
        elif record.entry.epoch != self._own.epoch:
            self._on_own(revision)

    def _delete(self, kv: rpc_pb2.KeyValue) -> None:
        try:
            node = self._keys.node_of(kv.key)
        except BadRecord:
            return
        if self._own is not None and node == self._own.node:
            self._on_own(kv.mod_revision)
        elif node in self._entries:
            if kv.mod_revision <= self._missed:
                self._later({node: self._entries[node]})
            else:
                self._remove(node)

    def _add(self, entry: NodeEntry) -> None:
        if self._entries.get(entry.node) != entry:
            log.debug("directory_node_known", node=entry.node, address=entry.address, epoch=entry.epoch)
        self._entries[entry.node] = entry
        self._gone.pop(entry.node, None)

    def _remove(self, node: str) -> None:
        entry = self._entries.pop(node)
        self._gone[node] = _Gone(entry, asyncio.get_running_loop().time())
        if len(self._gone) > _MAX_GONE:
            del self._gone[next(iter(self._gone))]
        log.info("directory_node_gone", node=node, address=entry.address)

    def close(self) -> None:
        """Wait for nothing any more."""
        for timer in self._timers:
            timer.cancel()


def _shown(key: bytes) -> str:
    return repr(key[:200])[2:-1]
