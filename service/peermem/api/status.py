"""From faults to gRPC statuses: the one place where a status with ErrorInfo is built (AIP-193)."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from peermem.core.errors import DOMAIN, PeermemError


def to_grpc(error: PeermemError) -> grpc.Status:
    """Return the gRPC status of a fault, for `context.abort_with_status`."""
    detail = Any()
    detail.Pack(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata)))
    status: grpc.Status = rpc_status.to_status(Status(code=int(error.code), message=error.message, details=[detail]))
    return status
