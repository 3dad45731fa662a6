"""What memory answers that has nothing special to it."""

from __future__ import annotations


class PlainMemory:
    """Memory without dma-buf or device address, in which a NIC's writes are visible as soon as they are complete: base
    of a `DeviceMemory`."""

    device_address: int | None = None
    needs_flush = False
    exporter: str = ""
    is_reached_by_cpu: bool = True

    def alive(self) -> bool:
        """See DeviceMemory."""
        return True

    def dma_buf(self) -> tuple[int, int] | None:
        """See DeviceMemory."""
        return None

    async def flush(self) -> None:
        """See DeviceMemory."""
