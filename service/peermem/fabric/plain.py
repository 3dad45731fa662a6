"""What the fabrics without a NIC have in common: any memory will do, as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peermem.core.errors import NotSupported, PeermemError
from peermem.core.types import Path
from peermem.fabric.base import Proof
from peermem.memory import Memory


class NicLess:
    """The part of `Fabric` that is about NICs and registration."""

    @property
    def nics(self) -> Mapping[str, PeermemError | None]:
        """See Fabric."""
        return {}

    @property
    def unavailable(self) -> PeermemError | None:
        """See Fabric."""
        return None

    @property
    def separates_subjects(self) -> bool:
        """See Fabric. Each access is checked by the grant alone."""
        return False

    async def register(self, memory: Memory, path: Path, nics: Sequence[str] = (), subject: str = "") -> None:
        """See Fabric. The CPU reaches all memory."""

    async def unregister(self, memory: Memory) -> None:
        """See Fabric."""

    async def probe(self, nic: str, memory: Memory, path: Path, *, keep: bool = False) -> Proof:
        """See Fabric. Raises NotSupported."""
        raise NotSupported("Only NICs are probed, and this fabric uses none. Ask the verbs fabric.", nic=nic)
