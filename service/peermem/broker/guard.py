"""The policy in force: asked before anything of a region, transfer, device or file is told or touched.

Rules of this file:

* Each decision is made here, once, counted where it denies, and written to the audit log.
* Whoever may neither read, write nor manage a region is told what it would be told if there were none; so for a
  transfer that is neither its own nor one that it may manage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from peermem.broker.access import Use
from peermem.broker.regions import Region, region_not_found
from peermem.broker.transfers import transfer_not_found
from peermem.core.errors import AccessDenied, PeermemError
from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.policy import DENY_RULE, Action, Decision, Rules, Traits
from peermem.core.region import RegionRequest
from peermem.core.storage import Order
from peermem.core.transfer import TransferFacts
from peermem.telemetry.audit import Audit
from peermem.telemetry.policy import Denial, PolicyMetrics


class Stoppable(Protocol):
    """What uses regions, and can be made to stop."""

    def fail(self, error: PeermemError) -> None:
        """Stop for this reason."""


class Guard:
    """Decides by the policy in force."""

    def __init__(self, node: str, rules: Rules, audit: Audit, metrics: PolicyMetrics) -> None:
        self.rules = rules
        """The policy in force."""
        self._node = node
        self._audit = audit
        self._metrics = metrics
        self._known: dict[tuple[Subject, Action, int], Decision] = {}
        """What was decided about regions, by their uids,"""
        self._known_by = rules
        """and by which policy."""

    def check_region(self, subject: Subject, action: Action, region: Region, under: object = None) -> None:
        """Return when `subject` may do `action` with a region; `under` is the link that a grant of it is for.

        Raises AccessDenied, RegionNotFound.
        """
        decision = self._decide(subject, action, region)
        self._audit_it(subject, action, region.name, decision, under)
        if not decision.allowed:
            raise self._refusal(subject, action, region)

    def denial(self, subject: Subject, action: Action, region: Region) -> PeermemError | None:
        """Return why what was allowed before is not by the policy of now, or None. Only a denial is written down."""
        decision = self._decide(subject, action, region)
        if decision.allowed:
            return None
        self._audit_it(subject, action, region.name, decision)
        return self._refusal(subject, action, region)

    def _decide(self, subject: Subject, action: Action, region: Region) -> Decision:
        if self._known_by is not self.rules or len(self._known) >= _KNOWN:
            self._known_by = self.rules
            self._known.clear()
        key = subject, action, region.uid
        decision = self._known.get(key)
        if decision is None:
            decision = self._known[key] = self.rules.decide(subject, action, region_traits(region))
        return decision

    def fail_denied(self, uses: Iterable[tuple[Stoppable, Subject, Action, Region]]) -> None:
        """End each use of a region that the policy of now does not allow."""
        for user, subject, action, region in uses:
            if (error := self.denial(subject, action, region)) is not None:
                user.fail(error)

    def _refusal(self, subject: Subject, action: Action, region: Region) -> PeermemError:
        if not self.rules.eyes(subject)(region_traits(region)):
            self._metrics.denied(Denial.REGION_HIDDEN)
            return region_not_found(region.name, self._node)
        self._metrics.denied(Denial.RIGHT_MISSING)
        return self._denied(subject, action, region.name, region.owner)

    def check_creation(self, subject: Subject, device: str, request: RegionRequest) -> None:
        """Return when `subject` may make a region on a device. Raises AccessDenied."""
        decision = self.rules.decide(subject, Action.CREATE, Traits(str(subject), device, request.labels))
        self._audit_it(subject, Action.CREATE, f"nodes/{self._node}/devices/{device}", decision)
        if not decision.allowed:
            self._metrics.denied(Denial.DEVICE)
            labels = ",".join(f"{key}={value}" for key, value in request.labels.items())
            raise AccessDenied(
                f"{subject} may not make regions {f'labelled {labels} ' if labels else ''}on device {device}. Have the "
                f"operator of nodes/{self._node} give it the right to create there, or use another device.",
                device=device,
                subject=subject,
                action=Action.CREATE.value,
            )

    def check_file(self, subject: Subject, order: Order, path: str) -> None:
        """Return when `subject` may load or store a file. Raises AccessDenied."""
        action = Action.LOAD if order is Order.LOAD else Action.STORE
        decision = self.rules.decide_file(subject, action, path)
        self._audit_it(subject, action, path, decision)
        if not decision.allowed:
            self._metrics.denied(Denial.FILE)
            raise AccessDenied(
                f"{subject} may not {action.value} {path}. Have the operator of nodes/{self._node} give it the right "
                f"to {action.value} there, or name another file.",
                path=path,
                subject=subject,
                action=action.value,
            )

    def check_finder(self, subject: Subject) -> None:
        """Return when `subject` may look for published regions: whoever is identified, and whom a rule is for. Raises
        AccessDenied."""
        if subject.is_anonymous and not any(rule.is_for(subject) for rule in self.rules.rules):
            self._metrics.denied(Denial.RIGHT_MISSING)
            self._audit_it(subject, _FIND, f"nodes/{self._node}", Decision(False, DENY_RULE))
            raise AccessDenied(
                f"{subject} may not look for published regions on nodes/{self._node}. Show who you are: attach on this "
                "host, or connect with a certificate or a token.",
                subject=subject,
                action=_FIND,
            )

    def check_transfer(self, subject: Subject, transfer: TransferFacts) -> None:
        """Return when `subject` may cancel a transfer. Raises AccessDenied, TransferNotFound."""
        traits = Traits(transfer.owner)
        decision = self.rules.decide(subject, Action.MANAGE, traits)
        self._audit_it(subject, Action.MANAGE, transfer.name, decision)
        if decision.allowed:
            return
        if not self.rules.watched(subject)(traits):
            self._metrics.denied(Denial.TRANSFER_HIDDEN)
            raise transfer_not_found(transfer.name, self._node)
        self._metrics.denied(Denial.RIGHT_MISSING)
        raise self._denied(subject, Action.MANAGE, transfer.name, transfer.owner)

    def seen_region(self, subject: Subject, region: Region) -> Region:
        """Return a region if `subject` sees it. Raises RegionNotFound."""
        if not self.sees_region(subject)(region):
            self._metrics.denied(Denial.REGION_HIDDEN)
            self._audit_it(subject, _SEE, region.name, Decision(False, DENY_RULE))
            raise region_not_found(region.name, self._node)
        return region

    def seen_transfer(self, subject: Subject, transfer: TransferFacts) -> TransferFacts:
        """Return a transfer if `subject` sees it. Raises TransferNotFound."""
        if not self.sees_transfer(subject)(transfer):
            self._metrics.denied(Denial.TRANSFER_HIDDEN)
            self._audit_it(subject, _SEE, transfer.name, Decision(False, DENY_RULE))
            raise transfer_not_found(transfer.name, self._node)
        return transfer

    def sees_region(self, subject: Subject) -> Callable[[Region], bool]:
        """Return what tells which regions `subject` sees."""
        eyes = self.rules.eyes(subject)
        return lambda region: eyes(region_traits(region))

    def sees_transfer(self, subject: Subject) -> Callable[[TransferFacts], bool]:
        """Return what tells which transfers `subject` sees."""
        watched = self.rules.watched(subject)
        return lambda transfer: watched(Traits(transfer.owner))

    def _denied(self, subject: Subject, action: Action, name: ChildName, owner: str) -> AccessDenied:
        return AccessDenied(
            f"{name} belongs to {owner}; {subject} may not {action.value} it. Ask as {owner}, or have the operator of "
            f"nodes/{self._node} give {subject} the right.",
            name=name,
            owner=owner,
            subject=subject,
            action=action.value,
        )

    def _audit_it(
        self, subject: Subject, action: Action | str, resource: object, decision: Decision, under: object = None
    ) -> None:
        word = action.value if isinstance(action, Action) else action
        self._audit.decided(subject, word, resource, decision.rule, allowed=decision.allowed, under=under)


_SEE = "see"
_FIND = "find"
_KNOWN = 4096
"""Decisions about regions that are remembered: neither a region's owner, device and labels nor a policy ever change."""


def region_traits(region: Region) -> Traits:
    """Return what rules look at in a region."""
    return Traits(region.owner, region.device.name, region.labels)


def streams(regions: Iterable[Region]) -> Iterator[tuple[Stoppable, Subject, Action, Region]]:
    """Yield the streams of bytes into and out of regions, with who was allowed what for each."""
    for region in regions:
        for user in list(region.users):
            if isinstance(user, Use) and user.allowed is not None:
                yield user, *user.allowed, region
