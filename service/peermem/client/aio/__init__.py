"""The asyncio shell: the same names as the synchronous one, as awaitables."""

from peermem.client.aio.node import Node, connect
from peermem.client.aio.region import Region
from peermem.client.aio.transfer import Transfer

__all__ = ["Node", "Region", "Transfer", "connect"]
