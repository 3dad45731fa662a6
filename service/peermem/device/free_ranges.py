"""Which parts of a device are free: first fit, and neighbours become one again."""

from __future__ import annotations

import threading
from bisect import bisect_left


class FreeRanges:
    """The free ranges of `size` bytes, aligned as the lengths that are taken. Usable from any thread."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._starts = [0] if size else []
        self._ends = [size] if size else []

    @property
    def total(self) -> int:
        """Bytes that are free."""
        with self._lock:
            return sum(self._ends) - sum(self._starts)

    @property
    def largest(self) -> int:
        """Bytes of the largest free range."""
        with self._lock:
            return max((end - start for start, end in zip(self._starts, self._ends, strict=True)), default=0)

    def take(self, length: int) -> int | None:
        """Return the start of the first free range of `length` bytes, taken from now on; None when there is none."""
        with self._lock:
            for index, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
                if end - start > length:
                    self._starts[index] += length
                    return start
                if end - start == length:
                    del self._starts[index], self._ends[index]
                    return start
        return None

    def give_back(self, start: int, length: int) -> None:
        """Make a range free that `take` returned."""
        with self._lock:
            end, index = start + length, bisect_left(self._starts, start)
            if index < len(self._starts) and self._starts[index] == end:
                end = self._ends[index]
                del self._starts[index], self._ends[index]
            if index and self._ends[index - 1] == start:
                self._ends[index - 1] = end
            else:
                self._starts.insert(index, start)
                self._ends.insert(index, end)
