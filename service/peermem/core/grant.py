"""What a grant is asked for: one leg's bytes, for one right, on behalf of one subject. Values only."""

from __future__ import annotations

from typing import NamedTuple

from peermem.core.identity import Subject
from peermem.core.names import ChildName
from peermem.core.types import Rights


class Wanted(NamedTuple):
    """What a grant is to open."""

    region: ChildName
    right: Rights
    subject: Subject
    """On whose behalf."""
    offset: int
    """Of its first byte in the region, bytes; what is done under the grant counts from here."""
    length: int
    """Bytes, at least 1."""
    staged: bool = False
    """Whether by way of a staging buffer, whatever the region's path is."""
    traceparent: str = ""
    """Of the work that it is for, if that is traced."""
