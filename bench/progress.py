"""What the benchmarks say on standard error while they run, so that nothing is silent for long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

_BEGAN = time.monotonic()
_INTERVAL = 2.0


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGAN:4.0f} s] {text}", file=sys.stderr, flush=True)


def steps(count: int, what: str) -> Iterator[int]:
    """Count up to `count`, and say now and then how far it is."""
    told = time.monotonic()
    for index in range(count):
        if time.monotonic() > told + _INTERVAL:
            told = time.monotonic()
            say(f"{what}: {index} of {count}")
        yield index
