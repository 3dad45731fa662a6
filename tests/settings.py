"""The settings of brokers in tests."""

from __future__ import annotations

from collections.abc import Mapping

from peermem.broker.settings import Settings


def broker_settings(node: str, changes: Mapping[str, float]) -> Settings:
    """Return small limits, but for what a test changes."""
    return Settings(
        node=node,
        rails=int(changes.get("rails", 1)),
        max_regions=int(changes.get("max_regions", 64)),
        max_running=int(changes.get("max_running", 16)),
        max_segments=int(changes.get("max_segments", 131_072)),
        keep_ended=int(changes.get("keep_ended", 16)),
        keep_ended_for=changes.get("keep_ended_for", 60.0),
        grant_ttl=changes.get("grant_ttl", 30.0),
        link_idle=changes.get("link_idle", 60.0),
        retry_for=changes.get("retry_for", 10.0),
    )
