"""The states of nodes, regions and transfers, as a daemon tells them; in the order of the contract's numbers."""

from __future__ import annotations

from enum import StrEnum


class NodeState(StrEnum):
    """What is known of a node's being there."""

    UNSPECIFIED = "UNSPECIFIED"
    UP = "UP"
    UNCONFIRMED = "UNCONFIRMED"
    """The directory said so last, and can't be reached since."""
    GONE = "GONE"


class RegionState(StrEnum):
    """The life of a region."""

    UNSPECIFIED = "UNSPECIFIED"
    READY = "READY"
    DRAINING = "DRAINING"
    REVOKED = "REVOKED"


class TransferState(StrEnum):
    """The life of a transfer."""

    UNSPECIFIED = "UNSPECIFIED"
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    FENCING = "FENCING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens."""
        return self in (TransferState.SUCCEEDED, TransferState.FAILED, TransferState.CANCELLED)


class Direction(StrEnum):
    """Which way the bytes go, seen from the node that was asked."""

    UNSPECIFIED = "UNSPECIFIED"
    LOCAL = "LOCAL"
    PUSH = "PUSH"
    PULL = "PULL"
    RELAYED = "RELAYED"
