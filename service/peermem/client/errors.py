"""What another process reported, as the exceptions of `peermem.core.errors`.

Rules of this file:

* Only `PeermemError` leaves the client: whatever gRPC raises is turned into one here.
* What the daemon said (its ErrorInfo, or an `Error` message) wins; without it the status code decides.
* Nothing that came over a socket is trusted to be well formed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from peermem.core import errors
from peermem.core.errors import PeermemError
from peermem.v1 import error_pb2

_DETAILS_KEY = "grpc-status-details-bin"

_BY_CODE: dict[grpc.StatusCode, type[PeermemError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Timeout,
    grpc.StatusCode.UNIMPLEMENTED: errors.NotSupported,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.LimitReached,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidField,
}


class FailedCall(Protocol):
    """What a failed gRPC call tells, of the synchronous and the asyncio kind alike."""

    def code(self) -> grpc.StatusCode | None:
        """Status code."""

    def details(self) -> str | None:
        """Status message."""

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """Metadata that came with the status."""


def from_proto(error: error_pb2.Error) -> PeermemError:
    """Return the exception for an `Error` message."""
    return PeermemError.restore(error.reason, error.message, dict(error.metadata))


def from_call(call: FailedCall, target: str) -> PeermemError:
    """Return the exception for a call to `target` that ended with another status than OK."""
    told = _error_info(call.trailing_metadata() or ())
    if told is not None:
        return told
    code, details = call.code(), call.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE:
        return unreachable(target, details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.Timeout(
            f"The daemon at {target} did not answer in time; raise the timeout, or look at the daemon's health.",
            target=target,
        )
    name = code.name if code is not None else "UNKNOWN"
    kind = _BY_CODE.get(code, errors.Internal) if code is not None else errors.Internal
    return kind(f"The call to the daemon at {target} failed with {name}: {details}", target=target, status=name)


def unreachable(target: str, cause: str) -> errors.NodeUnreachable:
    """Return the exception for a daemon that can't be reached."""
    return errors.NodeUnreachable(
        f"The daemon at {target} can't be reached ({cause}); start peermemd there, or give another target.",
        target=target,
    )


def forgotten(transfer: str, refusal: PeermemError) -> errors.NodeUnreachable:
    """Return the exception for a transfer that its daemon had accepted, and does not know any more."""
    return errors.NodeUnreachable(
        f"The daemon of {transfer} was restarted and does not know it any more. What came of it is not known. When it "
        f"was asked for again it was refused: {refusal.message}",
        transfer=transfer,
        refusal=refusal.reason,
    )


def closed(target: str) -> errors.NodeUnreachable:
    """Return the exception for the use of a connection that this program closed."""
    return errors.NodeUnreachable(
        f"The connection to {target} was closed by this program; open another with peermem.connect.", target=target
    )


def _error_info(metadata: Iterable[tuple[str, str | bytes]]) -> PeermemError | None:
    for key, value in metadata:
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status, info = Status.FromString(value), ErrorInfo()
            for detail in status.details:
                if detail.Unpack(info) and info.domain == errors.DOMAIN:
                    return PeermemError.restore(info.reason, status.message, dict(info.metadata))
        except DecodeError:
            return None
    return None
