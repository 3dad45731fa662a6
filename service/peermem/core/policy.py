"""The rules of a policy: who may do what with which region, and whose limits a subject falls under.

Rules of this file:

* Nothing is allowed but what some rule allows; no rule forbids, so that their order decides only which one is named.
* Behind the operator's rules stand two built-in ones: an owner may use and manage what is its own, and root of this
  host may do everything unless the policy says otherwise. Nobody in particular owns nothing.
* A transfer has an owner, but neither a device nor labels: only a rule that names none of these is about transfers.
* A subject's tenant is the first one that names it; whom none names is a tenant of its own, without limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from peermem.core.identity import ROOT, Subject
from peermem.core.patterns import DevicePattern, Folder, OwnerPattern, SubjectPattern
from peermem.core.quota import Limits, Tenant
from peermem.core.types import Word

OWNER_RULE, ROOT_RULE, DENY_RULE = "built-in:owner", "built-in:root", "built-in:deny"
_KNOWN = 4096
"""Subjects whose tenant is remembered."""


class Action(Word):
    """What a subject wants to do; values are the rights' names in a policy."""

    READ = "read"
    WRITE = "write"
    MANAGE = "manage"
    CREATE = "create"
    """Make a region on a device, or of memory that the job hands in."""
    LOAD = "load"
    """Read a file into a region that the subject may write."""
    STORE = "store"
    """Write a region that the subject may read into a file."""


USES = frozenset((Action.READ, Action.WRITE, Action.MANAGE))
"""Who may do one of these with a region sees it."""
FILES = frozenset((Action.LOAD, Action.STORE))


@dataclass(frozen=True, slots=True)
class Traits:
    """What a rule looks at in a region, in a transfer (which has no device), or in a region that is to be made."""

    owner: str
    device: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


class Decision(NamedTuple):
    """What was decided."""

    allowed: bool
    rule: str
    """The first rule that allows it, else built-in:deny."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What some subjects may do."""

    name: str
    subjects: tuple[SubjectPattern, ...]
    rights: frozenset[Action]
    owners: tuple[OwnerPattern, ...] = ()
    """Whose regions and transfers; none: everybody's."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Only regions that carry all of these."""
    devices: tuple[DevicePattern, ...] = ()
    """Only regions on these; none: all."""
    files: tuple[Folder, ...] = ()
    """What may be loaded or stored."""

    def is_for(self, subject: Subject) -> bool:
        """Whether it says something about `subject`."""
        return any(pattern.matches(subject) for pattern in self.subjects)

    def covers(self, subject: Subject, traits: Traits) -> bool:
        """Whether it is about this region or transfer."""
        if self.owners and not any(pattern.matches(traits.owner, subject) for pattern in self.owners):
            return False
        if traits.device is None:
            return not self.labels and not self.devices
        if self.devices and not any(pattern.matches(traits.device) for pattern in self.devices):
            return False
        return self.labels.items() <= traits.labels.items()


@dataclass(frozen=True, slots=True)
class TenantRule:
    """Subjects that share limits, or have the same ones each."""

    name: str
    subjects: tuple[SubjectPattern, ...]
    limits: Limits
    weight: int = 1
    each: bool = False
    """Whether each subject is a tenant of its own."""


@dataclass(frozen=True, eq=False)
class Rules:
    """A policy."""

    rules: Sequence[Rule]
    tenants: Sequence[TenantRule] = ()
    root: bool = True
    """Whether root of this host may do everything."""
    shows_transfers: bool = False
    """Whether everybody sees everybody's transfers."""
    source: str = ""
    """The file that it is from; empty for a built-in one."""
    _known: dict[Subject, Tenant] = field(default_factory=dict, repr=False)

    def decide(self, subject: Subject, action: Action, traits: Traits) -> Decision:
        """Return whether `subject` may do `action` (no load or store) with a region or transfer, and by which rule."""
        for rule in self.rules:
            if action in rule.rights and rule.is_for(subject) and rule.covers(subject, traits):
                return Decision(True, rule.name)
        return self._built_in(subject, action, traits.owner)

    def decide_file(self, subject: Subject, action: Action, path: str) -> Decision:
        """Return whether `subject` may load or store the file of an absolute path, and by which rule."""
        for rule in self.rules:
            if action in rule.rights and rule.is_for(subject) and any(folder.holds(path) for folder in rule.files):
                return Decision(True, rule.name)
        return self._built_in(subject, action, "")

    def _built_in(self, subject: Subject, action: Action, owner: str) -> Decision:
        if action in USES and owner == str(subject) and not subject.is_anonymous:
            return Decision(True, OWNER_RULE)
        if self.root and subject.name == ROOT.name and not subject.node:
            return Decision(True, ROOT_RULE)
        return Decision(False, DENY_RULE)

    def eyes(self, subject: Subject) -> Callable[[Traits], bool]:
        """Return what tells which regions `subject` sees: those that it may read, write or manage."""
        return self._any_of(subject, USES)

    def watched(self, subject: Subject) -> Callable[[Traits], bool]:
        """Return what tells which transfers `subject` sees: its own, nobody's too, and those that it may manage."""
        managed = self._any_of(subject, frozenset((Action.MANAGE,)))
        return lambda traits: self.shows_transfers or traits.owner == str(subject) or managed(traits)

    def _any_of(self, subject: Subject, actions: frozenset[Action]) -> Callable[[Traits], bool]:
        rules = [rule for rule in self.rules if rule.rights & actions and rule.is_for(subject)]

        def allowed(traits: Traits) -> bool:
            return (
                any(rule.covers(subject, traits) for rule in rules)
                or self._built_in(subject, Action.MANAGE, traits.owner).allowed
            )

        return allowed

    def tenant(self, subject: Subject) -> Tenant:
        """Return whom the use of `subject` is counted for."""
        tenant = self._known.get(subject)
        if tenant is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            tenant = self._known[subject] = self._find_tenant(subject)
        return tenant

    def _find_tenant(self, subject: Subject) -> Tenant:
        for rule in self.tenants:
            if any(pattern.matches(subject) for pattern in rule.subjects):
                key = f"{rule.name}/{subject}" if rule.each else rule.name
                return Tenant(key, rule.limits, rule.weight)
        return Tenant(str(subject))


_EVERYBODY = (SubjectPattern("anyone"), SubjectPattern("anyone@*"))
_KNOWN_ONES = (SubjectPattern("identified"), SubjectPattern("identified@*"))
_NOBODY = tuple(map(OwnerPattern, ("anonymous", "anonymous@*", "mine")))
OPEN = Rules(
    (
        Rule(
            "built-in:open",
            _EVERYBODY,
            frozenset(Action) - {Action.MANAGE},
            files=(Folder("/"),),
        ),
        Rule("built-in:open", _EVERYBODY, frozenset((Action.MANAGE,)), owners=_NOBODY),
    ),
    shows_transfers=True,
)
"""Without a policy file, where it is open: whoever reaches the daemon may make, read and write every region, use the
files that the configuration opens, and see every transfer; what nobody owns, everybody may manage."""
OWN = Rules((Rule("built-in:own", _KNOWN_ONES, frozenset((Action.CREATE,))),))
"""Without a policy file, where it is not open: whoever is identified may make regions, and use its own."""
