from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peermem.core.errors import QuotaExceeded
from peermem.core.identity import Subject
from peermem.core.quota import Limits, Quotas, Resource, Tenant

USER, FRIEND, OTHER = Subject("uid:1"), Subject("uid:2"), Subject("uid:3")
LIMITS = Limits(regions=2, bytes=4096, transfers=1, outstanding=1 << 20, bytes_per_second=1000, requests_per_second=10)


def quotas(limits: Limits = LIMITS) -> Quotas:
    team = Tenant("team", limits)
    return Quotas(lambda subject: Tenant(str(subject)) if subject == OTHER else team)


@pytest.mark.parametrize(
    ("resource", "held", "asked", "told"),
    [
        (Resource.REGIONS, 2, 1, "holds 2 regions; 1 region more would be above its limit of 2 regions. Delete some"),
        (Resource.BYTES, 4000, 97, "holds regions of 3.9KiB; 97B more would be above its limit of 4KiB. Delete some"),
        (Resource.TRANSFERS, 1, 1, "runs 1 transfer; 1 transfer more would be above its limit of 1 transfer. Wait"),
        (Resource.OUTSTANDING, 1 << 20, 1, "running of 1MiB; 1B more would be above its limit of 1MiB. Wait for some"),
    ],
)
def test_above_a_limit_the_refusal_names_tenant_limit_use_and_fix(
    resource: Resource, held: int, asked: int, told: str
) -> None:
    book = quotas()
    hold = book.admit(USER, {resource: held}, 0.0)
    with pytest.raises(QuotaExceeded) as caught:
        book.admit(FRIEND, {resource: asked}, 0.0)
    assert "Tenant team" in caught.value.message
    assert told in caught.value.message
    assert f"have {resource.value} of the tenant raised in the policy file" in caught.value.message
    assert caught.value.metadata["resource"] == resource.value
    assert caught.value.metadata["tenant"] == "team"
    assert (caught.value.metadata["use"], caught.value.metadata["asked"]) == (str(held), str(asked))
    book.admit(OTHER, {resource: asked + held}, 0.0)
    book.release(hold, 0.0)
    book.release(hold, 0.0)
    book.admit(FRIEND, {resource: held}, 0.0)
    assert book.use("team") == {resource: held}


def test_all_or_nothing_is_admitted() -> None:
    book = quotas()
    with pytest.raises(QuotaExceeded):
        book.admit(USER, {Resource.REGIONS: 1, Resource.BYTES: 5000}, 0.0)
    assert book.use("team") == {}
    hold = book.admit(USER, {Resource.REGIONS: 1, Resource.BYTES: 96}, 0.0)
    with pytest.raises(QuotaExceeded):
        book.grow(hold, {Resource.BYTES: 4001}, 0.0)
    book.grow(hold, {Resource.BYTES: 4000}, 0.0)
    assert book.use("team") == {Resource.REGIONS: 1, Resource.BYTES: 4096}
    book.release(hold, 0.0)
    assert book.use("team") == {}


def test_requests_beyond_the_rate_are_told_when_to_come_again() -> None:
    book = quotas()
    for _ in range(10):
        book.request(USER, 5.0)
    with pytest.raises(QuotaExceeded) as caught:
        book.request(FRIEND, 5.0)
    assert caught.value.metadata["retry_after"] == "0.100"
    assert caught.value.message == (
        "Tenant team asks more than 10 times a second, its limit. Try again in 0.100 s, or have requests_per_second of "
        "the tenant raised in the policy file."
    )
    book.request(OTHER, 5.0)
    book.request(USER, 5.1)
    with pytest.raises(QuotaExceeded):
        book.request(USER, 5.1)


def test_bytes_beyond_the_rate_wait() -> None:
    book = quotas()
    book.spend(USER, 1000, 0.0)
    assert book.wait(USER, 0.0) == 0
    book.spend(FRIEND, 500, 0.0)
    assert book.wait(USER, 0.0) == pytest.approx(0.5)
    with pytest.raises(QuotaExceeded, match=r"moves more than 1000B a second, its limit. Try again in 0.400 s"):
        book.check_pace(USER, 0.1)
    assert book.wait(USER, 0.5) == 0
    book.check_pace(USER, 0.5)
    assert book.wait(OTHER, 0.0) == 0
    book.check_pace(OTHER, 0.0)


def test_a_new_policy_counts_anew_what_is_held() -> None:
    book = quotas()
    hold = book.admit(USER, {Resource.REGIONS: 2}, 0.0)
    book.admit(OTHER, {Resource.REGIONS: 7}, 0.0)
    book.replace(lambda subject: Tenant("all", Limits(regions=5)), 1.0)
    assert book.use("all") == {Resource.REGIONS: 9}
    with pytest.raises(QuotaExceeded, match="holds 9 regions"):
        book.admit(FRIEND, {Resource.REGIONS: 1}, 1.0)
    book.release(hold, 1.0)
    assert book.use("all") == {Resource.REGIONS: 7}
    assert book.use("team") == {}


def test_who_holds_nothing_is_forgotten() -> None:
    book = Quotas(lambda subject: Tenant(str(subject), Limits(requests_per_second=5)))
    kept = book.admit(USER, {Resource.REGIONS: 1}, 0.0)
    for number in range(5000):
        book.request(Subject(f"uid:{1000 + number}"), number * 1.0)
    assert len(book) <= 1025
    assert book.use(str(USER)) == kept.amounts


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60))
def test_what_is_held_is_the_sum_and_never_above_the_limit(steps: list[tuple[bool, int]]) -> None:
    book = quotas(Limits(bytes=100))
    holds = []
    for takes, amount in steps:
        if takes:
            try:
                holds.append(book.admit(USER, {Resource.BYTES: amount}, 0.0))
            except QuotaExceeded:
                assert sum(hold.amounts[Resource.BYTES] for hold in holds) + amount > 100
        elif holds:
            book.release(holds.pop(amount % len(holds)), 0.0)
        total = sum(hold.amounts[Resource.BYTES] for hold in holds)
        assert book.use("team").get(Resource.BYTES, 0) == total <= 100


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=100))
def test_no_second_lets_more_through_than_two_seconds_worth(gaps: list[tuple[float, bool]]) -> None:
    book, now, passed = quotas(), 0.0, []
    for gap, _ in gaps:
        now += gap / 20
        try:
            book.request(USER, now)
            passed.append(now)
        except QuotaExceeded:
            pass
    for start in passed:
        assert sum(start <= at < start + 1 for at in passed) <= 20


def test_the_highest_use_is_that_of_the_tenant_nearest_to_its_limit() -> None:
    limits = {USER: Limits(regions=10, bytes=100), FRIEND: Limits(regions=2), OTHER: Limits()}
    book = Quotas(lambda subject: Tenant(str(subject), limits[subject]))
    assert set(book.highest().values()) == {0.0}
    for subject in limits:
        book.admit(subject, {Resource.REGIONS: 1, Resource.BYTES: 25}, 0.0)
    assert book.highest() == {
        Resource.REGIONS: 0.5,
        Resource.BYTES: 0.25,
        Resource.TRANSFERS: 0.0,
        Resource.OUTSTANDING: 0.0,
    }
