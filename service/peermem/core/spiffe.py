"""SPIFFE IDs: which are nodes, and which certificates count no more.

Rules of this file:

* An ID is taken as it is, byte for byte: no case is folded, nothing is unescaped.
* Pure; certificates are taken apart elsewhere, here arrive their IDs and fingerprints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)*", re.ASCII)
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_NODE = r"([a-z](?:[a-z0-9-]{0,61}[a-z0-9])?)"
MAX_LENGTH = 300
"""Characters of an ID that a subject may be named by."""


def is_spiffe_id(text: str) -> bool:
    """Whether `text` is a SPIFFE ID that a subject can be named by."""
    return len(text) <= MAX_LENGTH and _SPIFFE_ID.fullmatch(text) is not None


class NodePattern:
    """Tells the IDs of nodes: spiffe://example.org/peermem/{node}."""

    def __init__(self, text: str) -> None:
        """Raises ValueError where `text` is no SPIFFE ID with one {node}, which is a whole part of its path."""
        before, found, after = text.partition("/{node}")
        if (
            not found
            or not is_spiffe_id(before)
            or not is_spiffe_id(f"{before}/x{after}")
            or (after and not after.startswith("/"))
        ):
            raise ValueError("expected a SPIFFE ID with {node} as a part of its path")
        self._before, self._after = f"{before}/", after
        self._form = re.compile(re.escape(self._before) + _NODE + re.escape(after), re.ASCII)

    def spiffe_id(self, node: str) -> str:
        """Return the ID of a node by its short name."""
        return f"{self._before}{node}{self._after}"

    def node(self, spiffe_id: str) -> str | None:
        """Return the short name of the node with this ID; None for what is no node."""
        found = self._form.fullmatch(spiffe_id)
        return found[1] if found else None


@dataclass(frozen=True, slots=True)
class Denied:
    """IDs and certificates that count no more, although their authority signed them."""

    entries: frozenset[str] = field(default=frozenset())

    @staticmethod
    def parse(text: str) -> Denied:
        """Return the list in a file: an ID or `sha256:` and a certificate's fingerprint a line; # begins a comment.

        Raises ValueError, with the number of the line.
        """
        entries = set()
        for number, line in enumerate(text.splitlines(), 1):
            entry = line.partition("#")[0].strip()
            if entry and not _FINGERPRINT.fullmatch(entry) and not is_spiffe_id(entry):
                raise ValueError(f"line {number} is neither a SPIFFE ID nor sha256: with 64 hexadecimal digits")
            entries.add(entry)
        return Denied(frozenset(entries - {""}))

    def holds(self, spiffe_id: str, fingerprint: str) -> bool:
        """Whether a certificate is denied, by its ID or its fingerprint (`sha256:...`)."""
        return spiffe_id in self.entries or fingerprint in self.entries
