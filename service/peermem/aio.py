"""The asyncio client: `peermem.aio.connect`, with the same names as the synchronous one."""

from peermem.client.aio import Node, Region, Transfer, connect

__all__ = ["Node", "Region", "Transfer", "connect"]
