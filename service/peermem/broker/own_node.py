"""This daemon's own memory by the door that others use: there is one way to a key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from peermem.broker.serving import Serving
from peermem.core.grant import Wanted
from peermem.core.types import GrantedKey, LinkAttributes
from peermem.remote.base import Ear, GrantSource, OpenedLink


class _Deaf:
    """An `Ear` that nothing reaches."""

    def heard(self, message: bytes) -> None:
        """See Ear."""

    def broke(self) -> None:
        """See Ear."""


class OwnNode:
    """This daemon as its own `GrantSource`, for transfers between two regions of this node."""

    def __init__(self, serving: Serving, node: str) -> None:
        self._serving = serving
        self._node = node

    async def open_link(self, offer: LinkAttributes) -> OpenedLink:
        """See GrantSource."""
        return self._serving.open_link(self._node, offer)

    def use_rails(self, link_id: bytes, carry: Callable[[bytes], bool]) -> Ear:
        """See GrantSource. There is nothing to carry."""
        return _Deaf()

    async def close_link(self, link_id: bytes) -> None:
        """See GrantSource."""
        await self._serving.close_link(link_id)

    async def acquire_grant(self, link_id: bytes, epoch: str, wanted: Wanted) -> GrantedKey:
        """See GrantSource."""
        return await self._serving.acquire(link_id, epoch, wanted)

    async def release_grants(self, link_id: bytes, grant_ids: Sequence[int]) -> None:
        """See GrantSource."""
        await self._serving.release(link_id, grant_ids)

    def give_back(self, link_id: bytes, grant_id: int) -> None:
        """See GrantSource."""
        self._serving.release_soon(link_id, grant_id)

    async def copy_staged(
        self, link_id: bytes, grant_id: int, pieces: Sequence[tuple[int, int, int]], *, into_region: bool
    ) -> None:
        """See GrantSource."""
        await self._serving.copy_staged(link_id, grant_id, pieces, into_region=into_region)

    async def flush(self, link_id: bytes, grant_id: int) -> None:
        """See GrantSource."""
        await self._serving.flush(link_id, grant_id)

    async def checksum(
        self, link_id: bytes, grant_id: int, offsets: Sequence[int], lengths: Sequence[int], initial: int
    ) -> int:
        """See GrantSource."""
        return await self._serving.checksum(link_id, grant_id, offsets, lengths, initial)


if TYPE_CHECKING:
    _: type[GrantSource] = OwnNode
