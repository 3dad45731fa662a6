"""From faults to gRPC statuses: the one place where a status with its details is built (AIP-193)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from peermem.core.errors import DOMAIN, PeermemError, QuotaExceeded

_SECONDS = re.compile(r"[0-9]{1,6}\.[0-9]{1,9}", re.ASCII)


def to_grpc(error: PeermemError) -> grpc.Status:
    """Return the gRPC status of a fault, for `context.abort_with_status`."""
    details = [_packed(detail) for detail in (_info(error), *_quota(error))]
    status: grpc.Status = rpc_status.to_status(Status(code=int(error.code), message=error.message, details=details))
    return status


def _info(error: PeermemError) -> ErrorInfo:
    return ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata))


def _quota(error: PeermemError) -> Iterator[Message]:
    """Yield whose limit is reached, and when to come again where that is known. It may be another node that says so."""
    if isinstance(error, QuotaExceeded):
        tenant = f"tenant:{error.metadata.get('tenant', '')}"
        yield QuotaFailure(violations=[QuotaFailure.Violation(subject=tenant, description=error.message)])
        seconds = error.metadata.get("retry_after", "")
        if _SECONDS.fullmatch(seconds):
            delay = Duration()
            delay.FromNanoseconds(round(float(seconds) * 1e9))
            yield RetryInfo(retry_delay=delay)


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed
