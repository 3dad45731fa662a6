"""What a caller's library finds in a status."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from peermem.api.status import to_grpc
from peermem.core.errors import LimitReached, PeermemError, QuotaExceeded
from peermem.core.identity import Subject
from peermem.core.quota import Limits, Quotas, Resource, Tenant

USER = Subject("uid:1")
QUOTAS = Quotas(lambda subject: Tenant("team", Limits(regions=1, requests_per_second=4)))


def details(error: PeermemError) -> list[Message]:
    found: list[Message] = []
    for key, value in to_grpc(error).trailing_metadata:
        if key == "grpc-status-details-bin":
            for packed in Status.FromString(value).details:
                kind = {each.DESCRIPTOR.full_name: each for each in (ErrorInfo, QuotaFailure, RetryInfo)}
                found.append(kind[packed.TypeName()].FromString(packed.value))
    return found


def test_a_fault_has_its_reason_and_its_names() -> None:
    (info,) = details(LimitReached("Too many.", limit=7))
    assert info == ErrorInfo(reason="LIMIT_REACHED", domain="peermem", metadata={"limit": "7"})


def test_a_tenants_limit_is_a_quota_failure() -> None:
    with pytest.raises(QuotaExceeded) as caught:
        QUOTAS.admit(USER, {Resource.REGIONS: 2}, 0.0)
    info, failure = details(caught.value)
    assert isinstance(info, ErrorInfo)
    assert info.reason == "QUOTA_EXCEEDED"
    assert dict(info.metadata) == {"tenant": "team", "resource": "regions", "limit": "1", "use": "0", "asked": "2"}
    assert isinstance(failure, QuotaFailure)
    assert [each.subject for each in failure.violations] == ["tenant:team"]
    assert failure.violations[0].description == caught.value.message


@pytest.mark.parametrize("metadata", [{}, {"retry_after": "soon"}, {"retry_after": "inf"}, {"retry_after": "-1.0"}])
def test_what_another_node_says_may_make_no_sense(metadata: dict[str, str]) -> None:
    _, failure = details(PeermemError.restore("QUOTA_EXCEEDED", "Too many.", metadata))
    assert isinstance(failure, QuotaFailure)
    assert failure.violations[0].subject == "tenant:"


def test_a_rate_says_when_to_come_again() -> None:
    for _ in range(4):
        QUOTAS.request(USER, 0.0)
    with pytest.raises(QuotaExceeded) as caught:
        QUOTAS.request(USER, 0.0)
    _, _, retry = details(caught.value)
    assert isinstance(retry, RetryInfo)
    assert retry.retry_delay.ToNanoseconds() == 250_000_000


@pytest.mark.parametrize("after", ["", "soon", "nan", "inf", "1e300", "-1e300"])
def test_what_another_daemon_says_of_a_limit_may_be_anything(after: str) -> None:
    info, failure, *retry = details(QuotaExceeded("Too much.", retry_after=after))
    assert isinstance(info, ErrorInfo)
    assert isinstance(failure, QuotaFailure)
    assert len(retry) <= 1
