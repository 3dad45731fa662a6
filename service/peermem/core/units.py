"""Sizes and durations as people write them: `64MiB`, `1.5GiB`, `30s`, `2h`.

Sizes are binary only (KiB, MiB, GiB, TiB); decimal units such as MB are refused, because half of
the world means the other thing by them.
"""

from __future__ import annotations

import re
from decimal import Decimal

_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DURATIONS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", re.ASCII)


def parse_size(text: str | int) -> int:
    """Return the bytes that `text` names: an integer, or a number with B, KiB, MiB, GiB or TiB.

    Raises ValueError with a sentence when `text` is no size or not a whole number of bytes.
    """
    if isinstance(text, int):
        return text
    match = _NUMBER.fullmatch(text.strip())
    if not match or match[2] not in _SIZES:
        raise ValueError(f"{text!r} is no size: write a number with B, KiB, MiB, GiB or TiB, such as 64MiB")
    size = Decimal(match[1]) * _SIZES[match[2]]
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """Return `size` bytes as `64MiB`, with at most one decimal: `1.5GiB`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _SIZES[unit]
        if size >= scale:
            return f"{size // scale}{unit}" if size % scale == 0 else f"{size / scale:.1f}{unit}"
    return f"{size}B"


def parse_duration(text: str | float) -> float:
    """Return the seconds that `text` names: a number, or one with us, ms, s, min, h or d.

    Raises ValueError with a sentence when `text` is no duration.
    """
    if isinstance(text, (int, float)):
        return float(text)
    match = _NUMBER.fullmatch(text.strip())
    if not match or match[2] not in _DURATIONS:
        raise ValueError(f"{text!r} is no duration: write a number with us, ms, s, min, h or d, such as 30s")
    return float(match[1]) * _DURATIONS[match[2]]


def format_duration(seconds: float) -> str:
    """Return `seconds` in the unit that reads best: `250us`, `1.2ms`, `3.0s`, `2.5min`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f}ms"
    if seconds < 120:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.1f}min" if seconds < 7200 else f"{seconds / 3600:.1f}h"
