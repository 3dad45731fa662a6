from __future__ import annotations

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from peermem.client import errors
from peermem.core.errors import (
    Code,
    Internal,
    LimitReached,
    NodeUnreachable,
    NotSupported,
    PeermemError,
    RegionNotFound,
    Timeout,
    Unauthenticated,
)
from peermem.v1 import error_pb2


class Failed:
    def __init__(self, code: grpc.StatusCode | None, *metadata: tuple[str, str | bytes]) -> None:
        self._code = code
        self._metadata = metadata

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def details(self) -> str | None:
        return "why"

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...] | None:
        return self._metadata


def details(reason: str, domain: str = "peermem", **metadata: str) -> tuple[str, bytes]:
    packed = Any()
    packed.Pack(ErrorInfo(reason=reason, domain=domain, metadata=metadata))
    return "grpc-status-details-bin", Status(message="sentence", details=[packed]).SerializeToString()


def test_what_the_daemon_said_wins() -> None:
    call = Failed(grpc.StatusCode.UNAVAILABLE, ("other", "x"), details("REGION_NOT_FOUND", region="nodes/a/regions/x"))
    fault = errors.from_call(call, "a:1")
    assert type(fault) is RegionNotFound
    assert (fault.message, fault.code, fault.metadata) == (
        "sentence",
        Code.NOT_FOUND,
        {"region": "nodes/a/regions/x"},
    )


def test_every_reason_has_its_class() -> None:
    for reason, kind in PeermemError.by_reason.items():
        assert type(errors.from_call(Failed(grpc.StatusCode.UNKNOWN, details(reason)), "a:1")) is kind
        assert type(errors.from_proto(error_pb2.Error(reason=reason, message="m"))) is kind


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, NodeUnreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Timeout),
        (grpc.StatusCode.UNIMPLEMENTED, NotSupported),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, LimitReached),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.UNKNOWN, Internal),
        (None, Internal),
    ],
)
def test_without_details_the_code_decides(code: grpc.StatusCode | None, kind: type[PeermemError]) -> None:
    fault = errors.from_call(Failed(code), "a:1")
    assert type(fault) is kind
    assert "a:1" in fault.message
    assert fault.metadata["target"] == "a:1"


@pytest.mark.parametrize(
    "trailer",
    [("grpc-status-details-bin", b"\xff\xff"), ("grpc-status-details-bin", "text"), details("X", domain="elsewhere")],
    ids=["garbage", "text", "foreign domain"],
)
def test_details_that_are_not_ours_are_left_aside(trailer: tuple[str, str | bytes]) -> None:
    assert type(errors.from_call(Failed(grpc.StatusCode.UNAVAILABLE, trailer), "a:1")) is NodeUnreachable


def test_hostile_metadata_keys_do_no_harm() -> None:
    error = error_pb2.Error(reason="INTERNAL", message="m", metadata={"self": "1", "message": "2", "": "3"})
    assert errors.from_proto(error).metadata == {"self": "1", "message": "2", "": "3"}


def test_an_unknown_reason_is_internal() -> None:
    assert type(errors.from_proto(error_pb2.Error(reason="NEWER_THAN_THIS", message="m"))) is Internal
