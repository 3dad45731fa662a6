"""What a GPU device needs of the vendor's driver, the same for each vendor.

Rules for who implements it (`cuda.py`, `rocm.py`):

* A call may take long and holds no lock meanwhile: it is made in the device's own threads (`gpu_threads.py`), and sets
  up what its thread needs by itself.
* What the driver refuses raises GpuFault, whose kind is all that callers tell apart.
* Nothing is imported or loaded before `open`.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class FaultKind(Enum):
    """What a refused call means."""

    NO_MEMORY = "no memory"
    LOST = "lost"
    """The GPU, or the daemon's context on it, is gone: nothing works any more, and its memory has lost its bytes."""
    OTHER = "other"


class GpuFault(Exception):
    """The driver refused a call."""

    def __init__(self, call: str, code: str, kind: FaultKind) -> None:
        """`code` is the driver's name for why."""
        super().__init__(f"{call} returned {code}")
        self.kind = kind


class Visibility(Enum):
    """How what a NIC has written to the GPU's memory becomes visible to work on the GPU."""

    AT_ONCE = "at once"
    BY_FLUSH = "by flush"
    NEVER = "never"
    """No call of the driver ensures it: NICs are not to write there."""


class GpuDriver(Protocol):
    """One GPU. Addresses are its own; the CPU can do nothing with them."""

    @property
    def visibility(self) -> Visibility:
        """See Visibility; known once it is open."""

    def open(self) -> None:
        """Load the library and open the GPU. Raises GpuDriverMissing, GpuFault."""

    def close(self) -> None:
        """Let go of the GPU, and of all that is still open on it. Raises GpuFault."""

    def allocate(self, length: int) -> int:
        """Return the address of new memory, in whole pages of the host. Raises GpuFault."""

    def free(self, address: int) -> None:
        """Give back what `allocate` returned. Raises GpuFault."""

    def open_handle(self, handle: bytes) -> tuple[int, int]:
        """Return the address and the length of an allocation of another process. Raises GpuFault, also for a handle of
        this process, and for one of no allocation."""

    def close_handle(self, address: int) -> None:
        """End one `open_handle`. Raises GpuFault."""

    def export(self, address: int, length: int) -> tuple[int, int]:
        """Return a new descriptor of a dma-buf of whole pages of the host, and where `address` is in it. Raises
        GpuFault."""

    def make_queue(self) -> object:
        """Return a queue whose copies are made one after the other. Raises GpuFault."""

    def end_queue(self, queue: object) -> None:
        """End a queue that is empty. Raises GpuFault."""

    def load(self, queue: object, address: int, host: int, length: int) -> None:
        """Queue a copy to host memory at `host`. Raises GpuFault."""

    def store(self, queue: object, address: int, host: int, length: int) -> None:
        """Queue a copy from host memory at `host`. Raises GpuFault."""

    def zero(self, queue: object, address: int, length: int) -> None:
        """Queue that the memory is zeroed. Raises GpuFault."""

    def mark(self, queue: object) -> object:
        """Return something to `wait` for, once: the end of all that is queued so far. Raises GpuFault."""

    def wait(self, mark: object) -> None:
        """Wait, without the GIL. Raises GpuFault where what was queued failed."""

    def pin(self, host: int, length: int) -> None:
        """Lock host memory, so that copies from and to it go by themselves. Raises GpuFault."""

    def unpin(self, host: int) -> None:
        """End `pin`. Raises GpuFault."""

    def flush(self) -> None:
        """Make all that NICs have written so far visible to the GPU. Raises GpuFault."""
