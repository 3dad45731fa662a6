"""What tenants hold and how fast they go, on this node: `core.quota` with the time, the metrics and the waiting.

Rules of this file:

* What begins something is refused above a limit; what ends something or keeps it alive never is.
* Bytes above a rate are not refused: slices, and pieces of a stream, wait for their turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from peermem.core.errors import QuotaExceeded
from peermem.core.identity import Subject
from peermem.core.policy import Rules
from peermem.core.quota import Hold, Quotas, Resource, Tenant
from peermem.telemetry.policy import PolicyMetrics


class Share:
    """One subject's share of a link, by the policy of the moment; what `turns` goes by, some times for each slice."""

    __slots__ = ("_rules", "_tenant", "_tenants", "subject")

    def __init__(self, tenants: Tenants, subject: Subject) -> None:
        self._tenants = tenants
        self.subject = subject
        self._rules = tenants.rules
        self._tenant = tenants.of(subject)

    @property
    def tenant(self) -> Tenant:
        """Whom it is counted for."""
        if self._rules is not self._tenants.rules:
            self._rules, self._tenant = self._tenants.rules, self._tenants.of(self.subject)
        return self._tenant

    def wait(self) -> float:
        """Return for how many seconds its bytes have to wait."""
        return self._tenants.wait(self.subject) if self.tenant.limits.bytes_per_second else 0.0

    def spend(self, count: int) -> None:
        """Count bytes that are about to move."""
        if self.tenant.limits.bytes_per_second:
            self._tenants.spend(self.subject, count)


class Tenants:
    """The tenants of this node. Used on the event loop only."""

    def __init__(self, rules: Rules, metrics: PolicyMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.rules = rules
        """Those of the moment."""
        self._metrics = metrics
        self._clock = clock
        self._quotas = Quotas(rules.tenant)

    def go_by(self, rules: Rules) -> None:
        """Count by another policy from now on."""
        self.rules = rules
        self._quotas.replace(rules.tenant, self._clock())

    def of(self, subject: Subject) -> Tenant:
        """Return whom a subject is counted for."""
        return self.rules.tenant(subject)

    def highest(self) -> Mapping[Resource, float]:
        """Return the highest use by any one tenant of each limit, as a share of it."""
        return self._quotas.highest()

    def request(self, subject: Subject) -> None:
        """Count one request. Raises QuotaExceeded."""
        with self._counting():
            self._quotas.request(subject, self._clock())

    def hold(self, subject: Subject, amounts: Mapping[Resource, int]) -> Hold:
        """Count what a subject is to hold, until `release`. Raises QuotaExceeded."""
        with self._counting():
            return self._quotas.admit(subject, amounts, self._clock())

    def grow(self, hold: Hold, amounts: Mapping[Resource, int]) -> None:
        """Add to what is held. Raises QuotaExceeded."""
        with self._counting():
            self._quotas.grow(hold, amounts, self._clock())

    def release(self, hold: Hold) -> None:
        """Give back what is held. A second time is no error."""
        self._quotas.release(hold, self._clock())

    def spend(self, subject: Subject, count: int) -> None:
        """Count bytes that move."""
        self._quotas.spend(subject, count, self._clock())

    def wait(self, subject: Subject) -> float:
        """Return for how many seconds a subject's bytes have to wait."""
        return self._quotas.wait(subject, self._clock())

    def check_pace(self, subject: Subject) -> None:
        """Raise QuotaExceeded while a subject's bytes have to wait."""
        with self._counting():
            self._quotas.check_pace(subject, self._clock())

    async def pace(self, subject: Subject, count: int) -> None:
        """Wait until a subject may move so many bytes more."""
        while wait := self.wait(subject):  # noqa: ASYNC110  time is what is waited for
            await asyncio.sleep(wait)
        self.spend(subject, count)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except QuotaExceeded as error:
            self._metrics.rejected(Resource(error.metadata["resource"]))
            raise
