"""Who may speak of whom: a client that asked one node, whose transfer another node runs, and a third node's region.

Rules of this file:

* A node speaks of the clients that it identified itself; that it is that node, its connection proved.
* Of another node's client it may speak only while that node has it run a transfer for that client, and only of regions
  and rights that the transfer needs. That node is asked.
* A link for another node's client it may have under the same condition.
* A client that this node identified itself, and hears of by way of another node, is its own client again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from peermem.core.errors import AccessDenied
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.transfer import TransferRequest
from peermem.core.types import Rights
from peermem.remote.base import Remotes


class _Need(NamedTuple):
    node: str
    subject: Subject
    region: ChildName
    right: Rights


class _Run(NamedTuple):
    """That a node runs some transfer for a subject, named without its groups."""

    node: str
    subject: str


class Vouching:
    """What this node has others do for its clients, and what others may do here for clients that are not theirs."""

    def __init__(self, node: str, remotes: Remotes) -> None:
        self._node = node
        self._remotes = remotes
        self._relayed: Counter[_Need | _Run] = Counter()

    @contextmanager
    def relaying(self, node: str, subject: Subject, request: TransferRequest) -> Iterator[None]:
        """Confirm, while this lasts, that `node` runs a transfer for `subject`."""
        spoken = subject.vouched_for(self._node)
        needs: set[_Need | _Run] = {
            _Need(node, spoken, region, right)
            for entry in request.lists
            for region, right in ((entry.source, Rights.READ), (entry.destination, Rights.WRITE))
        }
        needs.add(_Run(node, str(spoken)))
        self._relayed.update(needs)
        try:
            yield
        finally:
            self._relayed.subtract(needs)
            for need in needs:
                if not self._relayed[need]:
                    del self._relayed[need]

    def check_relayed(self, node: str, subject: Subject, region: ChildName, right: Rights) -> None:
        """Return where `node` runs a transfer for `subject`, as nodes speak of it, that needs this.

        Raises AccessDenied.
        """
        if not self._relayed[_Need(node, subject, region, right)]:
            raise AccessDenied(
                f"nodes/{self._node} has no transfer of {subject} under way on nodes/{node} that needs to "
                f"{'read' if right is Rights.READ else 'write'} {region}.",
                node=node,
                subject=subject,
                region=region,
            )

    def check_runs(self, node: str, subject: str) -> None:
        """Return where `node` runs a transfer for `subject`, as nodes speak of it without its groups.

        Raises AccessDenied.
        """
        if not self._relayed[_Run(node, subject)]:
            raise AccessDenied(
                f"nodes/{self._node} has no transfer of {subject} under way on nodes/{node}.",
                node=node,
                subject=subject,
            )

    async def check_link(self, node: str, subject: Subject) -> None:
        """Return where `node` may have a link for `subject`, as nodes speak of it.

        Raises AccessDenied, NodeNotFound, NodeUnreachable.
        """
        if subject.node == self._node:
            self.check_runs(node, str(subject))
        elif subject.node != node:
            await self._remotes.get(subject.node).confirm_runs(node, subject)

    async def confirmed(self, node: str, subject: Subject, region: ChildName, right: Rights) -> Subject:
        """Return whom the policy is asked about, when `node` wants a right to a region for `subject`.

        Raises AccessDenied, NodeNotFound, NodeUnreachable.
        """
        if subject.node == node:
            return subject
        if subject.node == self._node:
            self.check_relayed(node, subject, region, right)
            return replace(subject, node="")
        await self._remotes.get(subject.node).confirm_relay(node, subject, region, right)
        return subject
