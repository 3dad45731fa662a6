"""Patterns of a policy: whom a rule is for, whose regions it opens, on which devices and in which directories.

Rules of this file:

* A pattern means one thing whoever vouches: without @NODE it is only for whom this daemon identified itself.
* Nobody in particular owns nothing: `mine` and `namesake` never stand for what is anonymous.
* A star stands for part of one word. It never crosses a slash, a trust domain is always spelt out, and what could
  match nothing is refused.
* Pure: a pattern is text, taken apart once.
"""

from __future__ import annotations

import re
from typing import ClassVar

from peermem.core.identity import ANONYMOUS, Subject

_NODE = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_SPOKEN = re.compile(rf"(?P<name>[^@]{{1,300}})(?:@(?P<node>\*|{_NODE}))?", re.ASCII)
_UID = re.compile(r"uid:(?:\*|0|[1-9][0-9]{0,9})", re.ASCII)
_GID = re.compile(r"gid:(?:0|[1-9][0-9]{0,9})", re.ASCII)
_SPIFFE = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/[A-Za-z0-9._*-]+)+", re.ASCII)
_KUBERNETES = re.compile(r"kubernetes:[a-z0-9*-]{1,63}/[a-z0-9.*-]{1,253}", re.ASCII)
_DEVICE = re.compile(r"[a-z*][a-z0-9*-]{0,62}", re.ASCII)


class SubjectPattern:
    """Some subjects, such as `uid:1000`, `gid:100@*` or `spiffe://example.org/job/*`."""

    __slots__ = ("_kind", "_name", "_node", "text")

    expected: ClassVar[str] = (
        "a subject: uid:NUMBER or uid:*, gid:NUMBER, spiffe://TRUST-DOMAIN/PATH, kubernetes:NAMESPACE/ACCOUNT, "
        "anonymous, identified or anyone, where * stands for part of a name and a last /** for the rest of a path; "
        "with @NODE or @* behind it for whom another node vouches for"
    )

    def __init__(self, text: object) -> None:
        """Raises ValueError."""
        found = _SPOKEN.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(self.expected)
        self.text = found[0]
        self._node = found["node"] or ""
        self._kind, self._name = _kind(found["name"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    @property
    def is_one(self) -> bool:
        """Whether it is the name of one subject."""
        return self._kind == "name" and "*" not in self.text

    def matches(self, subject: Subject) -> bool:
        """Whether it stands for `subject`."""
        if self._node == "*":
            if not subject.node:
                return False
        elif self._node != subject.node:
            return False
        if self._kind == "group":
            return self._name.pattern in subject.groups
        if self._kind == "identified":
            return not subject.is_anonymous
        return self._name.fullmatch(subject.name) is not None


def _kind(name: str) -> tuple[str, re.Pattern[str]]:
    """Return how a name is compared, and with what. Raises ValueError."""
    if name in ("anyone", "identified"):
        return name, _ANYTHING
    if name == ANONYMOUS.name or _UID.fullmatch(name):
        return "name", _glob(name)
    if _GID.fullmatch(name):
        return "group", re.compile(name)
    if _KUBERNETES.fullmatch(name) or _SPIFFE.fullmatch(name):
        return "name", _glob(name)
    raise ValueError(SubjectPattern.expected)


class OwnerPattern:
    """Whose regions and transfers: a subject's pattern, `mine` or `namesake`."""

    __slots__ = ("_subject", "text")

    expected: ClassVar[str] = (
        '"mine" (whose owner is the subject itself), "namesake" (whose owner has the same name, whichever node vouches '
        f"for either of them), or {SubjectPattern.expected}; an owner has no gid"
    )

    def __init__(self, text: object) -> None:
        """Raises ValueError."""
        own = text in ("mine", "namesake")
        if isinstance(text, str) and text.startswith("gid:"):
            raise ValueError(self.expected)
        try:
            self._subject = None if own else SubjectPattern(text)
        except ValueError:
            raise ValueError(self.expected) from None
        self.text = str(text)

    def __repr__(self) -> str:
        return f"OwnerPattern({self.text!r})"

    def matches(self, owner: str, subject: Subject) -> bool:
        """Whether it stands for `owner`, as seen by `subject`."""
        name, _, node = owner.partition("@")
        if self._subject is None:
            own = owner == str(subject) if self.text == "mine" else name == subject.name
            return own and not subject.is_anonymous
        return self._subject.matches(Subject(name, (), node))


class DevicePattern:
    """Some devices, such as `gpu*`."""

    __slots__ = ("_name", "text")

    expected: ClassVar[str] = "a device's name, in which * stands for any part, such as memfd0 or gpu*"

    def __init__(self, text: object) -> None:
        """Raises ValueError."""
        if not isinstance(text, str) or not _DEVICE.fullmatch(text):
            raise ValueError(self.expected)
        self.text = text
        self._name = _glob(text)

    def __repr__(self) -> str:
        return f"DevicePattern({self.text!r})"

    def matches(self, device: str) -> bool:
        """Whether it stands for `device`."""
        return self._name.fullmatch(device) is not None


class Folder:
    """A directory with all that is below it, or a single file or block device."""

    __slots__ = ("_parts", "text")

    expected: ClassVar[str] = "an absolute path without '..' and without *: it stands for all that is below it, too"

    def __init__(self, text: object) -> None:
        """Raises ValueError."""
        if not isinstance(text, str) or not text.startswith("/") or "\0" in text or "*" in text:
            raise ValueError(self.expected)
        self.text = text
        self._parts = _parts(text)
        if ".." in self._parts:
            raise ValueError(self.expected)

    def __repr__(self) -> str:
        return f"Folder({self.text!r})"

    def holds(self, path: str) -> bool:
        """Whether a path is it or below it, by its words alone: storage follows no symbolic link below its places."""
        parts = _parts(path)
        return path.startswith("/") and ".." not in parts and parts[: len(self._parts)] == self._parts


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


_ANYTHING = re.compile(r".*", re.DOTALL)


def _glob(text: str) -> re.Pattern[str]:
    """Return what a text with stars stands for. Raises ValueError where it could stand for nothing that exists."""
    head, rest = (text[:-3], r"/.+") if text.endswith("/**") else (text, "")
    if "**" in head or not {".", "..", ""}.isdisjoint(head.partition("://")[2].split("/")[1:]):
        raise ValueError(SubjectPattern.expected)
    return re.compile("[^/]*".join(map(re.escape, head.split("*"))) + rest, re.ASCII | re.DOTALL)
