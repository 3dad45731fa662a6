"""Limits of tenants: what each holds, and how fast it may go. Pure; the time is handed in, in seconds.

Rules of this file:

* What is held is counted when it is admitted, and given back exactly once, by whoever holds the `Hold`.
* Nothing is counted when it is refused: either all of what was asked for is admitted, or none of it.
* A rate is a bucket of tokens that holds one second's worth. Requests beyond it are refused and told when to come
  again; bytes beyond it are not refused, they wait: a bucket in debt says for how long.
* A new policy counts what is held anew, under its own tenants; what is above a lower limit stays, and nothing is added.
* Only tenants that hold something or whose bucket is not full are remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product

from peermem.core.errors import QuotaExceeded
from peermem.core.identity import Subject
from peermem.core.types import Word
from peermem.core.units import format_size


class Resource(Word):
    """What is limited; values are a tenant's keys in a policy, and metric labels."""

    REGIONS = "regions"
    BYTES = "bytes"
    TRANSFERS = "transfers"
    OUTSTANDING = "outstanding"
    BYTES_PER_SECOND = "bytes_per_second"
    REQUESTS_PER_SECOND = "requests_per_second"


HELD = Resource.REGIONS, Resource.BYTES, Resource.TRANSFERS, Resource.OUTSTANDING
"""What is held; the others are rates."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one tenant on one node; None: no limit."""

    regions: int | None = None
    """Regions at the same time."""
    bytes: int | None = None
    """Of all its regions together."""
    transfers: int | None = None
    """Transfers, loads and stores that have not ended."""
    outstanding: int | None = None
    """Bytes that these were asked to move."""
    bytes_per_second: int | None = None
    requests_per_second: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whom use is counted for."""

    key: str
    """Names it, in errors too."""
    limits: Limits = Limits()
    weight: int = 1
    """Its share of a link beside other tenants'."""


@dataclass(slots=True)
class TokenBucket:
    """A rate with one second's worth of burst, which may go into debt."""

    rate: float
    """Tokens a second."""
    tokens: float
    at: float
    """When it held so many."""

    def refill(self, now: float) -> None:
        """Take in what has come since."""
        self.tokens = min(self.rate, self.tokens + self.rate * max(0.0, now - self.at))
        self.at = max(self.at, now)

    def wait(self, now: float) -> float:
        """Return the seconds until it is out of debt; 0 where it is."""
        self.refill(now)
        return max(0.0, -self.tokens / self.rate)


@dataclass(slots=True, eq=False)
class Hold:
    """What one region, transfer or stream holds; given back with `Quotas.release`."""

    subject: Subject
    amounts: dict[Resource, int]


@dataclass(slots=True)
class _Account:
    """What one tenant has."""

    tenant: Tenant
    held: dict[Resource, int] = field(default_factory=dict)
    requests: TokenBucket | None = None
    bytes: TokenBucket | None = None

    def add(self, amounts: Mapping[Resource, int], sign: int = 1) -> None:
        for resource, amount in amounts.items():
            self.held[resource] = self.held.get(resource, 0) + sign * amount

    def idle(self, now: float) -> bool:
        """Whether forgetting it changes nothing."""
        for bucket in filter(None, (self.requests, self.bytes)):
            bucket.refill(now)
            if bucket.tokens < bucket.rate:
                return False
        return not any(self.held.values())


_ROUNDING = 1e-6
"""What sums of floats may be off by, in tokens."""
_TIDY = 1024
"""Accounts from which the idle ones are forgotten before a new one is opened."""


class Quotas:
    """All that tenants hold on this node."""

    def __init__(self, tenant: Callable[[Subject], Tenant]) -> None:
        """`tenant` returns whom a subject is counted for."""
        self._tenant = tenant
        self._accounts: dict[str, _Account] = {}
        self._holds: set[Hold] = set()

    def replace(self, tenant: Callable[[Subject], Tenant], now: float) -> None:
        """Go by another policy from now on."""
        self._tenant = tenant
        self._accounts = {}
        for hold in self._holds:
            self._account(hold.subject, now).add(hold.amounts)

    def use(self, key: str) -> Mapping[Resource, int]:
        """Return what the tenant of this key holds."""
        account = self._accounts.get(key)
        return {} if account is None else {what: amount for what, amount in account.held.items() if amount}

    def highest(self) -> Mapping[Resource, float]:
        """Return, for each limit on what is held, the highest use by any one tenant as a share of its limit; 0 where
        no tenant that holds something has a limit."""
        shares = dict.fromkeys(HELD, 0.0)
        for account, resource in product(self._accounts.values(), HELD):
            limit: int | None = getattr(account.tenant.limits, resource.value)
            held = account.held.get(resource, 0)
            if limit is not None and held:
                shares[resource] = max(shares[resource], held / limit if limit else 1.0)
        return shares

    def __len__(self) -> int:
        return len(self._accounts)

    def admit(self, subject: Subject, amounts: Mapping[Resource, int], now: float) -> Hold:
        """Count what `subject` is to hold. Raises QuotaExceeded."""
        account = self._account(subject, now)
        _check(account, amounts)
        hold = Hold(subject, dict(amounts))
        account.add(amounts)
        self._holds.add(hold)
        return hold

    def grow(self, hold: Hold, amounts: Mapping[Resource, int], now: float) -> None:
        """Add to what is held. Raises QuotaExceeded; then it is as it was."""
        account = self._account(hold.subject, now)
        _check(account, amounts)
        account.add(amounts)
        for resource, amount in amounts.items():
            hold.amounts[resource] = hold.amounts.get(resource, 0) + amount

    def release(self, hold: Hold, now: float) -> None:
        """Give back what was held. A second time is no error."""
        if hold in self._holds:
            self._holds.remove(hold)
            self._account(hold.subject, now).add(hold.amounts, -1)

    def request(self, subject: Subject, now: float) -> None:
        """Count one request. Raises QuotaExceeded with the seconds after which to come again."""
        account = self._account(subject, now)
        bucket = account.requests
        if bucket is None:
            return
        bucket.refill(now)
        if bucket.tokens < 1 - _ROUNDING:
            raise _too_fast(account.tenant, Resource.REQUESTS_PER_SECOND, bucket, (1 - bucket.tokens) / bucket.rate)
        bucket.tokens -= 1

    def spend(self, subject: Subject, count: int, now: float) -> None:
        """Count bytes that moved or are about to; it may leave the tenant in debt, see `wait`."""
        bucket = self._account(subject, now).bytes
        if bucket is not None:
            bucket.refill(now)
            bucket.tokens -= count

    def wait(self, subject: Subject, now: float) -> float:
        """Return for how many seconds the tenant's bytes have to wait; 0 where they need not."""
        bucket = self._account(subject, now).bytes
        return bucket.wait(now) if bucket is not None else 0.0

    def check_pace(self, subject: Subject, now: float) -> None:
        """Raise QuotaExceeded while the tenant's bytes have to wait: for what can't wait itself."""
        account = self._account(subject, now)
        if account.bytes is not None and (wait := account.bytes.wait(now)):
            raise _too_fast(account.tenant, Resource.BYTES_PER_SECOND, account.bytes, wait)

    def _account(self, subject: Subject, now: float) -> _Account:
        tenant = self._tenant(subject)
        account = self._accounts.get(tenant.key)
        if account is None:
            if len(self._accounts) >= _TIDY:
                self._accounts = {key: each for key, each in self._accounts.items() if not each.idle(now)}
            account = self._accounts[tenant.key] = _Account(
                tenant,
                requests=_bucket(tenant.limits.requests_per_second, now),
                bytes=_bucket(tenant.limits.bytes_per_second, now),
            )
        return account


def _bucket(rate: int | None, now: float) -> TokenBucket | None:
    return TokenBucket(rate, rate, now) if rate else None


def _check(account: _Account, amounts: Mapping[Resource, int]) -> None:
    tenant = account.tenant
    for resource, amount in amounts.items():
        limit: int | None = getattr(tenant.limits, resource.value)
        held = account.held.get(resource, 0)
        if limit is not None and held + amount > limit:
            what = _WORDS[resource]
            raise QuotaExceeded(
                f"Tenant {tenant.key} {what.use} {what.text(held)}; {what.text(amount)} more would be above its limit "
                f"of {what.text(limit)}. {what.fix}, or have {resource.value} of the tenant raised in the policy file.",
                tenant=tenant.key,
                resource=resource.value,
                limit=limit,
                use=held,
                asked=amount,
            )


def _too_fast(tenant: Tenant, resource: Resource, bucket: TokenBucket, wait: float) -> QuotaExceeded:
    what = _WORDS[resource]
    wait = math.ceil(wait * 1000 - _ROUNDING) / 1000  # whoever comes again then is not a moment too early
    return QuotaExceeded(
        f"Tenant {tenant.key} {what.use} more than {what.text(int(bucket.rate))} a second, its limit. Try again in "
        f"{wait:.3f} s, or have {resource.value} of the tenant raised in the policy file.",
        tenant=tenant.key,
        resource=resource.value,
        limit=int(bucket.rate),
        use=int(bucket.rate - bucket.tokens),
        retry_after=f"{wait:.3f}",
    )


@dataclass(frozen=True, slots=True)
class _Words:
    """How a limit is told."""

    use: str
    text: Callable[[int], str]
    fix: str = ""


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


_WORDS = {
    Resource.REGIONS: _Words("holds", lambda count: _counted(count, "region"), "Delete some"),
    Resource.BYTES: _Words("holds regions of", format_size, "Delete some"),
    Resource.TRANSFERS: _Words("runs", lambda count: _counted(count, "transfer"), "Wait for some to end"),
    Resource.OUTSTANDING: _Words("has transfers running of", format_size, "Wait for some to end, or move less at once"),
    Resource.BYTES_PER_SECOND: _Words("moves", format_size),
    Resource.REQUESTS_PER_SECOND: _Words("asks", lambda count: _counted(count, "time")),
}
