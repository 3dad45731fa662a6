"""Resource names (AIP-122): nodes/{node}/regions/{region}, nodes/{node}/transfers/{transfer}."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from peermem.core.errors import InvalidField

_ID = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_ID_PATTERN = re.compile(_ID, re.ASCII)
_NODE_PATTERN = re.compile(rf"nodes/({_ID})", re.ASCII)
_CHILD_PATTERN = re.compile(rf"nodes/({_ID})/(regions|transfers)/({_ID})", re.ASCII)


class ChildName(NamedTuple):
    """A region's or transfer's name in its parts; `str()` gives the whole."""

    node: str
    collection: str
    id: str

    def __str__(self) -> str:
        return f"nodes/{self.node}/{self.collection}/{self.id}"


def check_id(text: str, field: str) -> str:
    """Return `text` if it can be the last part of a name (RFC 1123 label that starts with a letter).

    Raises InvalidField that names `field`.
    """
    if not _ID_PATTERN.fullmatch(text):
        raise InvalidField(
            f"{field} {text[:80]!r} must be 1 to 63 of a-z, 0-9 and -, start with a letter and not end with -.",
            field=field,
        )
    return text


def parse_node(name: str, field: str = "name") -> str:
    """Return the node of `nodes/{node}`. Raises InvalidField."""
    match = _NODE_PATTERN.fullmatch(name)
    if not match:
        raise InvalidField(f"{field} {name[:200]!r} must have the form nodes/NODE.", field=field)
    return match[1]


def parse_region(name: str, field: str = "name") -> ChildName:
    """Return the parts of `nodes/{node}/regions/{region}`. Raises InvalidField."""
    return _parse_child(name, "regions", field)


def parse_transfer(name: str, field: str = "name") -> ChildName:
    """Return the parts of `nodes/{node}/transfers/{transfer}`. Raises InvalidField."""
    return _parse_child(name, "transfers", field)


@lru_cache(4096)  # the same few regions are named again and again; only valid, so short, names are kept
def _parse_child(name: str, collection: str, field: str) -> ChildName:
    match = _CHILD_PATTERN.fullmatch(name)
    if not match or match[2] != collection:
        form = f"nodes/NODE/{collection}/{collection[:-1].upper()}"
        raise InvalidField(f"{field} {name[:200]!r} must have the form {form}.", field=field)
    return ChildName(match[1], match[2], match[3])
