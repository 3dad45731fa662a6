"""The part of the composition root that publishes this node's devices in Kubernetes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from peermem.api.api_server import ApiClient, ApiServer
from peermem.api.resource_slices import SlicePublisher
from peermem.config import Kubernetes
from peermem.core.node import DeviceFacts
from peermem.core.resource_slice import slice_spec
from peermem.core.topology import Topology
from peermem.offload import in_thread

Reached = Callable[[], Awaitable[Sequence[DeviceFacts]]]


def publish_devices(
    config: Kubernetes,
    devices: Reached,
    topology: Callable[[], Topology],
    stack: AsyncExitStack,
    spawn: Callable[[Coroutine[None, None, None]], None],
) -> None:
    """Begin to publish; `devices` tells how NICs reach them, `topology` reads in a thread, and `stack` ends it."""
    node = config.publish_as
    if node is None or config.api_server is None:
        return

    async def spec() -> dict[str, Any]:
        return slice_spec(node, await devices(), (await in_thread(topology)).functions)

    client = ApiClient(ApiServer(config.api_server, Path(config.ca), Path(config.token)))
    stack.push_async_callback(client.close)
    publisher = SlicePublisher(client, node, spec)
    stack.push_async_callback(publisher.withdraw)
    spawn(publisher.tend())
