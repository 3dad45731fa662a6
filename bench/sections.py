"""Sections of RESULTS.md that other commands than `make bench` write, each kept and replaced without the others."""

from __future__ import annotations

_NEXT = "\n## "


def section_of(text: str, heading: str) -> str:
    """Return the section of this heading, up to the next one; empty where there is none."""
    _, found, rest = text.partition(heading)
    return f"{(found + rest.partition(_NEXT)[0]).rstrip()}\n" if found else ""


def with_section(text: str, heading: str, section: str) -> str:
    """Return `text` with `section` in the place of the one of this heading, else at its end; an empty one is none."""
    before, found, rest = text.partition(heading)
    after = rest.partition(_NEXT)[2] if found else ""
    parts = [part.strip() for part in (before, section, f"## {after}" if after else "") if part.strip()]
    return "\n\n".join(parts) + "\n"
