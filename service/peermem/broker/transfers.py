"""The table of this node's transfers: those that run, and the ended ones for a while.

At most so many ended ones are kept, and none for longer than its time; the oldest go first.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from peermem.broker.runs import Transfer
from peermem.core.errors import LimitReached, TransferNotFound
from peermem.core.names import ChildName
from peermem.core.transfer import TransferFacts


def transfer_not_found(name: ChildName, node: str) -> TransferNotFound:
    """Return what is told of a transfer that is not on a node, or that the caller may not see."""
    return TransferNotFound(
        f"{name} does not exist on nodes/{node}, or ended too long ago to be remembered.", transfer=name
    )


class TransferTable:
    """All transfers of this node by the last part of their names."""

    def __init__(
        self,
        node: str,
        *,
        max_running: int,
        max_weight: int,
        keep_ended: int,
        keep_ended_for: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_weight` bounds the ranges of all running transfers together; `keep_ended_for` is in seconds."""
        self._node = node
        self._max_running = max_running
        self._keep = keep_ended
        self._keep_for = keep_ended_for
        self._clock = clock
        self._max_weight = max_weight
        self._weight = 0
        self._running: dict[str, tuple[Transfer, int]] = {}
        self._ended: OrderedDict[str, tuple[float, TransferFacts]] = OrderedDict()

    @property
    def running_count(self) -> int:
        """Transfers that have not ended."""
        return len(self._running)

    def running(self) -> Iterator[Transfer]:
        """Iterate over those that have not ended."""
        return iter([transfer for transfer, _ in self._running.values()])

    def check_room(self, weight: int) -> None:
        """Raise LimitReached when as many transfers run as may, or with as many ranges."""
        if self._weight + weight > self._max_weight and self._running:
            raise LimitReached(
                f"nodes/{self._node} runs transfers of {self._weight} segments; with {weight} more it would be above "
                f"its limit of {self._max_weight}. Wait for some to end.",
                limit=self._max_weight,
            )
        if len(self._running) >= self._max_running:
            raise LimitReached(
                f"nodes/{self._node} runs {self._max_running} transfers, its limit. Wait for some to end.",
                limit=self._max_running,
            )

    def add(self, name: ChildName, transfer: Transfer, weight: int) -> None:
        """Enter a transfer that starts, with the number of its ranges."""
        self._running[name.id] = transfer, weight
        self._weight += weight

    def ended(self, name: ChildName) -> TransferFacts:
        """Move a transfer to the ended ones and return its facts."""
        transfer, weight = self._running.pop(name.id)
        facts = transfer.facts
        if facts.error is not None:
            facts.error.bare()
        self._weight -= weight
        now = self._clock()
        self._ended[name.id] = (now, facts)
        while len(self._ended) > self._keep or next(iter(self._ended.values()))[0] < now - self._keep_for:
            self._ended.popitem(last=False)
        return facts

    def find_running(self, name: ChildName) -> Transfer | None:
        """Return a transfer that has not ended, or None."""
        found = self._running.get(name.id) if name.node == self._node else None
        return found[0] if found else None

    def facts(self, name: ChildName) -> TransferFacts:
        """Return a transfer as it stands or ended. Raises TransferNotFound."""
        transfer = self.find_running(name)
        if transfer is not None:
            return transfer.facts
        known = self._ended.get(name.id) if name.node == self._node else None
        if known is None or known[0] < self._clock() - self._keep_for:
            raise transfer_not_found(name, self._node)
        return known[1]

    def newest(self, *, running_only: bool) -> Iterator[TransferFacts]:
        """Iterate over the transfers, newest first."""
        for transfer, _ in reversed(list(self._running.values())):
            yield transfer.facts
        if not running_only:
            for _, facts in reversed(list(self._ended.values())):
                yield facts
