"""How many bytes a device still gives out, in whole pages; counted from any thread."""

from __future__ import annotations

import mmap
import threading

from peermem.core.errors import DeviceFull
from peermem.core.units import format_size
from peermem.memory import whole_pages


class Room:
    """The bytes of one device, or of several that share them."""

    def __init__(self, size: int) -> None:
        """What is beyond whole pages is left out."""
        self.size = size // mmap.PAGESIZE * mmap.PAGESIZE
        self.available = self.size
        self._lock = threading.Lock()

    def take(self, length: int, device: str, fix: str) -> None:
        """Count `length` bytes as given out by a device. Raises DeviceFull, which ends with the sentence `fix`."""
        pages = whole_pages(length)
        with self._lock:
            if pages <= self.available:
                self.available -= pages
                return
        raise DeviceFull(
            f"Device {device} has {format_size(self.available)} of {format_size(self.size)} left; "
            f"{format_size(length)} were asked for. {fix}",
            device=device,
            available=self.available,
            wanted=length,
        )

    def give_back(self, length: int) -> None:
        """Count them as free again."""
        with self._lock:
            self.available += whole_pages(length)
